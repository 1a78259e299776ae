// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AdapterRegistry} from "../src/AdapterRegistry.sol";
import {IAttributionRewards} from "../src/interfaces/IAttributionRewards.sol";
import {Base} from "./Base.sol";
import {MerkleTree} from "./MerkleTree.sol";

/// @notice Gas of every path, as whole transactions (base fee and calldata included), kept in `snapshots/`.
/// forge-config: default.isolate = true
contract GasTest is Base {
    using MerkleTree for bytes32[];

    uint256 private constant ACCOUNTS = 1024;

    function test_gas_escrow() public {
        escrow.deposit(PAYER, 1e18);
        vm.snapshotGasLastCall("UsageEscrow", "deposit, first of a payer");
        escrow.deposit(PAYER, 1e18);
        vm.snapshotGasLastCall("UsageEscrow", "deposit, next");

        _collect(PAYER_KEY, OPERATOR_KEY, 1e17);
        vm.snapshotGasLastCall("UsageEscrow", "collect, first of an operator");
        _collect(PAYER_KEY, OPERATOR_KEY, 2e17);
        vm.snapshotGasLastCall("UsageEscrow", "collect, next");

        vm.prank(PAYER);
        escrow.startThaw(1e17);
        vm.snapshotGasLastCall("UsageEscrow", "startThaw");
        vm.prank(PAYER);
        escrow.cancelThaw();
        vm.snapshotGasLastCall("UsageEscrow", "cancelThaw");
        vm.prank(PAYER);
        escrow.startThaw(1e17);
        vm.warp(block.timestamp + THAW);
        vm.prank(PAYER);
        escrow.withdraw();
        vm.snapshotGasLastCall("UsageEscrow", "withdraw");
    }

    function test_gas_rewards() public {
        _fundOperator(OPERATOR_KEY, 1e24);
        bytes32[] memory first = _tree(1e15);
        bytes32[] memory second = _tree(3e15);

        _activate(OPERATOR_KEY, first.root(), 1e23);
        vm.snapshotGasLastCall("AttributionRewards", "submitEpoch, first of an operator");
        _activate(OPERATOR_KEY, second.root(), 1e24);
        vm.snapshotGasLastCall("AttributionRewards", "submitEpoch, next");

        rewards.claim(OPERATOR, 0, _account(0), 1e15, first.proof(0));
        rewards.claim(OPERATOR, 0, _account(1), 1e15, first.proof(1));
        vm.snapshotGasLastCall("AttributionRewards", "claim of 1024, first of an account");
        rewards.claim(OPERATOR, 1, _account(1), 3e15, second.proof(1));
        vm.snapshotGasLastCall("AttributionRewards", "claim of 1024, next");

        _claimTen(0, first, 1e15);
        vm.snapshotGasLastCall("AttributionRewards", "claimMany of 1024, 10 accounts, first");
        _claimTen(1, second, 3e15);
        vm.snapshotGasLastCall("AttributionRewards", "claimMany of 1024, 10 accounts, next");

        _submit(OPERATOR_KEY, second.root(), 1e24);
        vm.prank(GUARDIAN);
        rewards.voidEpoch(OPERATOR, 2);
        vm.snapshotGasLastCall("AttributionRewards", "voidEpoch");
    }

    function test_gas_registry() public {
        AdapterRegistry registry = new AdapterRegistry(GUARDIAN);
        string memory uri = "https://example.org/adapters/manifest.json";
        registry.register(bytes32("adapter"), bytes32("manifest"), bytes32("base"), address(this), uri, "");
        vm.snapshotGasLastCall("AdapterRegistry", "register by the trainer");
        registry.publishManifest(bytes32("adapter"), bytes32("next"), uri);
        vm.snapshotGasLastCall("AdapterRegistry", "publishManifest");
        registry.deprecate(bytes32("adapter"));
        vm.snapshotGasLastCall("AdapterRegistry", "deprecate");
    }

    function _tree(uint256 each) internal view returns (bytes32[] memory) {
        uint256[] memory earned = new uint256[](ACCOUNTS);
        for (uint256 i = 0; i < ACCOUNTS; i++) {
            earned[i] = each;
        }
        return _leaves(OPERATOR, earned);
    }

    function _claimTen(uint256 epochId, bytes32[] memory leaves, uint256 each) internal {
        IAttributionRewards.Claim[] memory claims = new IAttributionRewards.Claim[](10);
        for (uint256 i = 0; i < 10; i++) {
            claims[i] = IAttributionRewards.Claim(_account(100 + i), each, leaves.proof(100 + i));
        }
        rewards.claimMany(OPERATOR, epochId, claims);
    }
}
