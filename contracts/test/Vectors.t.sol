// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AdapterRegistry} from "../src/AdapterRegistry.sol";
import {AttributionRewards} from "../src/AttributionRewards.sol";
import {Signatures} from "../src/Signatures.sol";
import {UsageEscrow} from "../src/UsageEscrow.sol";
import {IAttributionRewards} from "../src/interfaces/IAttributionRewards.sol";
import {IUsageEscrow} from "../src/interfaces/IUsageEscrow.sol";
import {Base} from "./Base.sol";
import {MerkleTree} from "./MerkleTree.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";

/// @dev The escrow with its digests laid open.
contract OpenEscrow is UsageEscrow {
    constructor(IERC20 token, IAttributionRewards rewards) UsageEscrow(token, rewards, 1) {}

    function voucherDigest(Voucher calldata voucher) external view returns (bytes32) {
        return _voucherDigest(voucher);
    }

    function collectionDigest(address payer, address operator, uint256 used) external view returns (bytes32) {
        return _collectionDigest(payer, operator, used);
    }
}

/// @dev The rewards with their digest laid open.
contract OpenRewards is AttributionRewards {
    constructor(IERC20 token, address escrow) AttributionRewards(token, escrow, 1, msg.sender) {}

    function epochDigest(Epoch calldata epoch) external view returns (bytes32) {
        return _epochDigest(epoch);
    }
}

/// @dev The registry with its digest laid open.
contract OpenRegistry is AdapterRegistry {
    constructor() AdapterRegistry(msg.sender) {}

    function registrationDigest(
        bytes32 adapterId,
        bytes32 manifestHash,
        bytes32 baseId,
        address trainer,
        string calldata uri
    ) external view returns (bytes32) {
        return _registrationDigest(adapterId, manifestHash, baseId, trainer, uri);
    }
}

/// @notice The golden vectors in `tests/vectors`, which the Python side writes and reads too.
contract VectorsTest is Base {
    using MerkleTree for bytes32[];

    bytes32 private constant VOUCHER = keccak256("Voucher");
    bytes32 private constant COLLECTION = keccak256("Collection");
    bytes32 private constant EPOCH = keccak256("Epoch");
    bytes32 private constant ADAPTER = keccak256("Adapter");

    OpenEscrow private openEscrow;
    OpenRewards private openRewards;
    OpenRegistry private openRegistry;
    string private json;

    function setUp() public override {
        address predicted = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 1);
        openRewards = new OpenRewards(IERC20(address(1)), predicted);
        openEscrow = new OpenEscrow(IERC20(address(1)), openRewards);
        openRegistry = new OpenRegistry();
    }

    /* MERKLE */

    function test_merkleVectors_leavesRootsAndProofs_match() public {
        json = vm.readFile("../tests/vectors/merkle.json");
        uint256 count = _length(".trees");
        vm.assertGe(count, 2, "several trees");

        for (uint256 i = 0; i < count; i++) {
            _checkTree(_item(".trees", i));
        }
    }

    function _checkTree(string memory tree) internal {
        bytes32 root = vm.parseJsonBytes32(json, string.concat(tree, ".root"));
        bytes32[] memory leaves = new bytes32[](_length(string.concat(tree, ".entries")));
        address lastAccount;
        for (uint256 i = 0; i < leaves.length; i++) {
            string memory entry = _item(string.concat(tree, ".entries"), i);
            address account = vm.parseJsonAddress(json, string.concat(entry, ".account"));
            vm.assertTrue(account > lastAccount, "sorted, each account once");
            lastAccount = account;
            leaves[i] = _leafOnChain(tree, account, vm.parseJsonUint(json, string.concat(entry, ".cumulative")));
            vm.assertEq(leaves[i], vm.parseJsonBytes32(json, string.concat(entry, ".leaf")), "leaf");
        }

        vm.assertEq(leaves.root(), root, "root");
        for (uint256 i = 0; i < leaves.length; i++) {
            string memory key = string.concat(_item(string.concat(tree, ".entries"), i), ".proof");
            bytes32[] memory proof = vm.parseJsonBytes32Array(json, key);
            vm.assertEq(abi.encode(proof), abi.encode(leaves.proof(i)), "proof");
            vm.assertTrue(MerkleProof.verify(proof, root, leaves[i]), "verifies");
        }
    }

    /// @dev Asks the contract itself, standing on the vector's chain at the vector's address.
    function _leafOnChain(string memory tree, address account, uint256 cumulative) internal returns (bytes32) {
        vm.chainId(vm.parseJsonUint(json, string.concat(tree, ".chain_id")));
        address at = vm.parseJsonAddress(json, string.concat(tree, ".rewards"));
        vm.etch(at, address(openRewards).code);
        address operator = vm.parseJsonAddress(json, string.concat(tree, ".operator"));
        return AttributionRewards(at).leafOf(operator, account, cumulative);
    }

    /* EIP-712 */

    function test_eip712Vectors_digestsAndSignatures_match() public {
        json = vm.readFile("../tests/vectors/eip712.json");
        uint256 count = _length(".cases");
        bytes32[4] memory kinds = [VOUCHER, COLLECTION, EPOCH, ADAPTER];
        uint256[4] memory seen;

        for (uint256 i = 0; i < count; i++) {
            string memory item = _item(".cases", i);
            bytes32 digest = vm.parseJsonBytes32(json, string.concat(item, ".digest"));
            _checkSignature(item, digest);
            for (uint256 k = 0; k < kinds.length; k++) {
                if (_kind(item) != kinds[k]) continue;
                vm.assertEq(_digestOnChain(item), digest, vm.parseJsonString(json, string.concat(item, ".name")));
                seen[k]++;
            }
        }

        for (uint256 k = 0; k < kinds.length; k++) {
            vm.assertGe(seen[k], 1, "every struct that a contract verifies has a case");
        }
    }

    function _checkSignature(string memory item, bytes32 digest) internal view {
        uint256 key = vm.parseJsonUint(json, string.concat(item, ".private_key"));
        address signer = vm.parseJsonAddress(json, string.concat(item, ".signer"));
        bytes memory signature = vm.parseJsonBytes(json, string.concat(item, ".signature"));

        vm.assertEq(vm.addr(key), signer, "signer");
        vm.assertEq(_signDigest(key, digest), signature, "signature");
        vm.assertTrue(Signatures.isValid(signer, digest, signature), "valid");
    }

    /// @dev Asks the contract itself, standing on the vector's chain at the vector's address.
    function _digestOnChain(string memory item) internal returns (bytes32) {
        vm.chainId(vm.parseJsonUint(json, string.concat(item, ".domain.chainId")));
        address at = vm.parseJsonAddress(json, string.concat(item, ".domain.verifyingContract"));
        bytes32 kind = _kind(item);

        if (kind == ADAPTER) {
            vm.etch(at, address(openRegistry).code);
            return _adapterDigest(item, OpenRegistry(at));
        }
        address operator = _address(item, "operator");
        if (kind == EPOCH) {
            vm.etch(at, address(openRewards).code);
            return OpenRewards(at).epochDigest(_epochMessage(item, operator));
        }
        vm.etch(at, address(openEscrow).code);
        address payer = _address(item, "payer");
        if (kind == COLLECTION) {
            return OpenEscrow(at).collectionDigest(payer, operator, _uint(item, "cumulativeUsed"));
        }
        uint64 deadline = uint64(_uint(item, "deadline"));
        return OpenEscrow(at).voucherDigest(IUsageEscrow.Voucher(payer, operator, _uint(item, "cumulative"), deadline));
    }

    function _adapterDigest(string memory item, OpenRegistry registry) internal view returns (bytes32) {
        return registry.registrationDigest(
            _bytes32(item, "adapterId"),
            _bytes32(item, "manifestHash"),
            _bytes32(item, "baseId"),
            _address(item, "trainer"),
            vm.parseJsonString(json, string.concat(item, ".message.uri"))
        );
    }

    function _epochMessage(string memory item, address operator)
        internal
        view
        returns (IAttributionRewards.Epoch memory)
    {
        return IAttributionRewards.Epoch({
            operator: operator,
            epochId: _uint(item, "epochId"),
            root: _bytes32(item, "root"),
            receiptsRoot: _bytes32(item, "receiptsRoot"),
            leavesHash: _bytes32(item, "leavesHash"),
            totalCumulative: _uint(item, "totalCumulative")
        });
    }

    /* JSON */

    function _kind(string memory item) internal view returns (bytes32) {
        return keccak256(bytes(vm.parseJsonString(json, string.concat(item, ".primary_type"))));
    }

    function _uint(string memory item, string memory field) internal view returns (uint256) {
        return vm.parseJsonUint(json, string.concat(item, ".message.", field));
    }

    function _address(string memory item, string memory field) internal view returns (address) {
        return vm.parseJsonAddress(json, string.concat(item, ".message.", field));
    }

    function _bytes32(string memory item, string memory field) internal view returns (bytes32) {
        return vm.parseJsonBytes32(json, string.concat(item, ".message.", field));
    }

    function _item(string memory list, uint256 index) internal pure returns (string memory) {
        return string.concat(list, "[", vm.toString(index), "]");
    }

    function _length(string memory list) internal view returns (uint256 count) {
        while (vm.keyExistsJson(json, _item(list, count))) count++;
    }
}
