// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AttributionRewards} from "../src/AttributionRewards.sol";
import {TestToken} from "../src/TestToken.sol";
import {UsageEscrow} from "../src/UsageEscrow.sol";
import {IAttributionRewards} from "../src/interfaces/IAttributionRewards.sol";
import {IUsageEscrow} from "../src/interfaces/IUsageEscrow.sol";
import {MerkleTree} from "./MerkleTree.sol";
import {Vm} from "./Vm.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @notice A deployed settlement, a funded payer and hand-written EIP-712 signing for every test.
abstract contract Base {
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

    uint64 internal constant THAW = 7 days;
    uint64 internal constant DELAY = 1 hours;
    uint64 internal constant FAR = type(uint64).max;

    uint256 internal constant PAYER_KEY = 0xA11CE;
    uint256 internal constant OPERATOR_KEY = 0x0B0B;
    uint256 internal constant OTHER_KEY = 0x0DD;

    address internal immutable PAYER = vm.addr(PAYER_KEY);
    address internal immutable OPERATOR = vm.addr(OPERATOR_KEY);
    address internal immutable OTHER = vm.addr(OTHER_KEY);
    address internal immutable GUARDIAN = address(0x6A4D);

    TestToken internal token;
    UsageEscrow internal escrow;
    AttributionRewards internal rewards;

    function setUp() public virtual {
        vm.warp(1_800_000_000);
        token = new TestToken(address(this));
        (escrow, rewards) = _deploy(IERC20(address(token)));
        token.mint(address(this), 1e30);
        token.approve(address(escrow), type(uint256).max);
    }

    function _deploy(IERC20 paymentToken) internal returns (UsageEscrow newEscrow, AttributionRewards newRewards) {
        address predicted = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 1);
        newRewards = new AttributionRewards(paymentToken, predicted, DELAY, GUARDIAN);
        newEscrow = new UsageEscrow(paymentToken, newRewards, THAW);
    }

    /* ESCROW */

    /// @dev Deposits for the payer and collects all of it for the operator of `operatorKey`.
    function _fundOperator(uint256 operatorKey, uint256 amount) internal {
        escrow.deposit(PAYER, amount);
        address operator = vm.addr(operatorKey);
        _collect(PAYER_KEY, operatorKey, escrow.collected(PAYER, operator) + amount);
    }

    function _collect(uint256 payerKey, uint256 operatorKey, uint256 used) internal {
        IUsageEscrow.Voucher memory voucher = _voucher(vm.addr(payerKey), vm.addr(operatorKey), used);
        bytes memory operatorSignature = _signCollection(operatorKey, voucher.payer, voucher.operator, used);
        escrow.collect(voucher, _signVoucher(payerKey, voucher), used, operatorSignature);
    }

    function _voucher(address payer, address operator, uint256 cumulative)
        internal
        pure
        returns (IUsageEscrow.Voucher memory)
    {
        return IUsageEscrow.Voucher(payer, operator, cumulative, FAR);
    }

    function _signVoucher(uint256 key, IUsageEscrow.Voucher memory v) internal view returns (bytes memory) {
        bytes32 typeHash = keccak256("Voucher(address payer,address operator,uint256 cumulative,uint64 deadline)");
        bytes32 structHash = keccak256(abi.encode(typeHash, v.payer, v.operator, v.cumulative, v.deadline));
        return _sign(key, "OpenLoRA UsageEscrow", address(escrow), structHash);
    }

    function _signCollection(uint256 key, address payer, address operator, uint256 used)
        internal
        view
        returns (bytes memory)
    {
        bytes32 typeHash = keccak256("Collection(address payer,address operator,uint256 cumulativeUsed)");
        bytes32 structHash = keccak256(abi.encode(typeHash, payer, operator, used));
        return _sign(key, "OpenLoRA UsageEscrow", address(escrow), structHash);
    }

    /* REWARDS */

    /// @dev Submits the next epoch of the operator of `operatorKey`.
    function _submit(uint256 operatorKey, bytes32 root, uint256 total) internal returns (uint256 epochId) {
        IAttributionRewards.Epoch memory epoch = _epoch(vm.addr(operatorKey), root, total);
        rewards.submitEpoch(epoch, _signEpoch(operatorKey, epoch));
        return epoch.epochId;
    }

    /// @dev `_submit`, then waits out the challenge delay.
    function _activate(uint256 operatorKey, bytes32 root, uint256 total) internal returns (uint256 epochId) {
        epochId = _submit(operatorKey, root, total);
        vm.warp(block.timestamp + DELAY);
    }

    function _epoch(address operator, bytes32 root, uint256 total)
        internal
        view
        returns (IAttributionRewards.Epoch memory)
    {
        uint256 epochId = rewards.epochCount(operator);
        return IAttributionRewards.Epoch(operator, epochId, root, keccak256("receipts"), keccak256("leaves"), total);
    }

    function _signEpoch(uint256 key, IAttributionRewards.Epoch memory e) internal view returns (bytes memory) {
        bytes32 typeHash = keccak256(
            "Epoch(address operator,uint256 epochId,bytes32 root,bytes32 receiptsRoot,bytes32 leavesHash,uint256 totalCumulative)"
        );
        bytes32 structHash = keccak256(
            abi.encode(typeHash, e.operator, e.epochId, e.root, e.receiptsRoot, e.leavesHash, e.totalCumulative)
        );
        return _sign(key, "OpenLoRA AttributionRewards", address(rewards), structHash);
    }

    /// @dev Leaves of accounts 0x1001, 0x1002, ... with the given cumulative earnings.
    function _leaves(address operator, uint256[] memory cumulatives) internal view returns (bytes32[] memory leaves) {
        leaves = new bytes32[](cumulatives.length);
        for (uint256 i = 0; i < leaves.length; i++) {
            leaves[i] = _leaf(block.chainid, address(rewards), operator, _account(i), cumulatives[i]);
        }
    }

    function _leaf(uint256 chainId, address rewardsAddress, address operator, address account, uint256 cumulative)
        internal
        pure
        returns (bytes32)
    {
        return keccak256(bytes.concat(keccak256(abi.encode(chainId, rewardsAddress, operator, account, cumulative))));
    }

    function _account(uint256 index) internal pure returns (address) {
        return address(uint160(0x1001 + index));
    }

    function _pair(uint256 first, uint256 second) internal pure returns (uint256[] memory values) {
        values = new uint256[](2);
        (values[0], values[1]) = (first, second);
    }

    /* SIGNING */

    function _sign(uint256 key, string memory name, address verifier, bytes32 structHash)
        internal
        view
        returns (bytes memory)
    {
        return _signDigest(key, keccak256(abi.encodePacked("\x19\x01", _domain(name, verifier), structHash)));
    }

    function _signDigest(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }

    function _domain(string memory name, address verifier) internal view returns (bytes32) {
        bytes32 typeHash =
            keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
        return keccak256(abi.encode(typeHash, keccak256(bytes(name)), keccak256("1"), block.chainid, verifier));
    }

    function _bound(uint256 value, uint256 low, uint256 high) internal pure returns (uint256) {
        return low + value % (high - low + 1);
    }
}
