// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {Base} from "./Base.sol";
import {Handler} from "./Handler.sol";

/// @notice What stays true of the money, whatever anyone does in whatever order. See `Handler` for the actions.
contract SettlementInvariantTest is Base {
    Handler private handler;
    mapping(address operator => mapping(uint256 index => uint256)) private _claimedSeen;

    function setUp() public override {
        super.setUp();
        handler = new Handler(token, escrow, rewards);
        token.mint(address(handler), 1e36);
    }

    /// @dev Read by forge: only the handler is called.
    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function invariant_rewards_holdExactlyWhatIsFundedAndUnpaid() public view {
        uint256 owed;
        for (uint256 i = 0; i < 2; i++) {
            address operator = handler.operatorAt(i);
            vm.assertLe(rewards.paid(operator), rewards.funded(operator), "paid above funded");
            owed += rewards.funded(operator) - rewards.paid(operator);
        }
        vm.assertEq(token.balanceOf(address(rewards)), owed, "rewards balance");
    }

    function invariant_claims_sumToPaidAndNeverExceedAPayingTotal() public view {
        for (uint256 i = 0; i < 2; i++) {
            address operator = handler.operatorAt(i);
            vm.assertEq(handler.claimedSum(operator), rewards.paid(operator), "claimed is not paid");
            vm.assertLe(rewards.paid(operator), handler.largestPayingTotal(operator), "paid above every total");
        }
    }

    function invariant_claimed_neverDecreases() public {
        for (uint256 i = 0; i < 6; i++) {
            address operator = handler.operatorAt(i);
            uint256 claimedNow = rewards.claimed(operator, _account(i / 2));
            vm.assertGe(claimedNow, _claimedSeen[operator][i / 2], "claimed fell");
            _claimedSeen[operator][i / 2] = claimedNow;
        }
    }

    function invariant_escrow_balancesAreDepositsLessCollectedLessWithdrawn() public view {
        uint256 sum;
        for (uint256 i = 0; i < 2; i++) {
            address payer = handler.payerAt(i);
            uint256 gone = handler.collectedSum(payer) + handler.withdrawnSum(payer);
            vm.assertEq(escrow.balanceOf(payer), handler.depositedSum(payer) - gone, "balance");
            vm.assertLe(escrow.thawOf(payer).amount, escrow.balanceOf(payer), "thaw above balance");
            sum += escrow.balanceOf(payer);
        }
        vm.assertEq(token.balanceOf(address(escrow)), sum, "escrow balance");
    }

    function invariant_funded_isWhatTheOperatorsOwnPayersPaid() public view {
        for (uint256 i = 0; i < 2; i++) {
            address operator = handler.operatorAt(i);
            uint256 collected =
                escrow.collected(handler.payerAt(0), operator) + escrow.collected(handler.payerAt(1), operator);
            vm.assertEq(rewards.funded(operator), collected, "funded");
        }
    }

    /// @dev The handler's actions do go through: invariants over actions that all fail would prove nothing.
    function test_handler_everyAction_goesThrough() public {
        handler.deposit(0, 1000);
        handler.collect(0, 0, 600);
        handler.submitEpoch(0, [uint96(100), 200, 300], 599, false);
        handler.submitEpoch(0, [uint96(150), 150, 150], 0, true);
        handler.submitEpoch(0, [uint96(100), 200, 300], 600, false);
        handler.voidEpoch(0, 2);
        handler.warp(uint16(DELAY));
        handler.claim(0, 0, false);
        handler.claim(0, 1, true);
        handler.startThaw(0, 10);
        handler.withdraw(0);

        bytes4[7] memory actions = [
            handler.deposit.selector,
            handler.collect.selector,
            handler.submitEpoch.selector,
            handler.voidEpoch.selector,
            handler.claim.selector,
            handler.startThaw.selector,
            handler.withdraw.selector
        ];
        for (uint256 i = 0; i < actions.length; i++) {
            vm.assertGe(handler.successes(actions[i]), 1, "an action never went through");
        }
        vm.assertGe(handler.repeatedClaims(), 1, "no account was paid twice");
    }
}
