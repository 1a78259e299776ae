// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AttributionRewards} from "../src/AttributionRewards.sol";
import {ExactTransfer} from "../src/ExactTransfer.sol";
import {UsageEscrow} from "../src/UsageEscrow.sol";
import {IUsageEscrow} from "../src/interfaces/IUsageEscrow.sol";
import {Base} from "./Base.sol";
import {ContractAccount, FeeToken, ReentrantToken, Refuser} from "./Doubles.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {ReentrancyGuard} from "@openzeppelin/contracts/utils/ReentrancyGuard.sol";

contract UsageEscrowTest is Base {
    /* CONSTRUCTION */

    function test_constructor_rewardsOfAnotherEscrow_reverts() public {
        address next = vm.computeCreateAddress(address(this), vm.getNonce(address(this)));
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.RewardsEscrowMismatch.selector, address(escrow), next));
        new UsageEscrow(token, rewards, THAW);
    }

    function test_constructor_rewardsInAnotherToken_reverts() public {
        IERC20 other = IERC20(address(0x70CE));
        address predicted = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 1);
        AttributionRewards otherRewards = new AttributionRewards(other, predicted, DELAY, GUARDIAN);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.RewardsTokenMismatch.selector, other, token));
        new UsageEscrow(token, otherRewards, THAW);
    }

    function test_constructor_thawOutOfRange_reverts() public {
        uint64 limit = escrow.MAX_THAW_SECONDS();
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.ThawOutOfRange.selector, 0, limit));
        new UsageEscrow(token, rewards, 0);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.ThawOutOfRange.selector, limit + 1, limit));
        new UsageEscrow(token, rewards, limit + 1);
    }

    /* DEPOSIT */

    function testFuzz_deposit_byAnyone_creditsPayerOnly(address payer, uint96 amount) public {
        vm.assume(payer != address(0) && payer != address(this) && amount != 0);

        vm.expectEmit(address(escrow));
        emit IUsageEscrow.Deposited(address(this), payer, amount);
        escrow.deposit(payer, amount);

        vm.assertEq(escrow.balanceOf(payer), amount, "payer");
        vm.assertEq(escrow.balanceOf(address(this)), 0, "sender");
        vm.assertEq(token.balanceOf(address(escrow)), amount, "tokens");
    }

    function test_deposit_nothingOrNobody_reverts() public {
        vm.expectRevert(IUsageEscrow.ZeroAmount.selector);
        escrow.deposit(PAYER, 0);

        vm.expectRevert(IUsageEscrow.ZeroAddress.selector);
        escrow.deposit(address(0), 1);
    }

    function test_deposit_byStranger_leavesThawAlone() public {
        _startThaw(100, 40);
        IUsageEscrow.Thaw memory thawBefore = escrow.thawOf(PAYER);
        vm.warp(block.timestamp + 1 days);

        escrow.deposit(PAYER, 1);

        vm.assertEq(abi.encode(escrow.thawOf(PAYER)), abi.encode(thawBefore), "thaw");
        vm.assertEq(escrow.committedOf(PAYER), 61, "committed");
    }

    function test_deposit_tokenKeepsFee_reverts() public {
        FeeToken feeToken = new FeeToken();
        (UsageEscrow feeEscrow,) = _deploy(feeToken);
        feeToken.approve(address(feeEscrow), 1000);
        feeToken.charge();

        vm.expectRevert(abi.encodeWithSelector(ExactTransfer.InexactTransfer.selector, 1000, 990));
        feeEscrow.deposit(PAYER, 1000);
    }

    function test_deposit_reentrantToken_cannotEnterAgain() public {
        ReentrantToken hostile = new ReentrantToken();
        (UsageEscrow hostileEscrow,) = _deploy(hostile);
        hostile.approve(address(hostileEscrow), 1000);
        hostile.arm(address(hostileEscrow), abi.encodeCall(IUsageEscrow.deposit, (PAYER, 1)));

        hostileEscrow.deposit(PAYER, 10);

        _assertGuardHeld(hostile);
        vm.assertEq(hostileEscrow.balanceOf(PAYER), 10, "balance");
    }

    /* THAW AND WITHDRAW */

    function testFuzz_withdraw_afterThaw_paysPayer(uint96 deposited, uint96 thawed, uint32 late) public {
        deposited = uint96(_bound(deposited, 1, type(uint96).max));
        thawed = uint96(_bound(thawed, 1, deposited));
        _startThaw(deposited, thawed);
        vm.warp(block.timestamp + THAW + late);

        vm.prank(PAYER);
        escrow.withdraw();

        vm.assertEq(token.balanceOf(PAYER), thawed, "paid out");
        vm.assertEq(escrow.balanceOf(PAYER), uint256(deposited) - thawed, "left");
        vm.assertEq(escrow.thawOf(PAYER).amount, 0, "thaw");
    }

    function test_withdraw_oneSecondEarly_reverts() public {
        _startThaw(100, 40);
        uint64 endsAt = escrow.thawOf(PAYER).endsAt;
        vm.warp(endsAt - 1);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.StillThawing.selector, endsAt, endsAt - 1));
        vm.prank(PAYER);
        escrow.withdraw();
    }

    function testFuzz_thaw_byStranger_reverts(address stranger) public {
        vm.assume(stranger != PAYER);
        _startThaw(100, 40);
        vm.warp(block.timestamp + THAW);

        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InsufficientBalance.selector, stranger, 0, 1));
        escrow.startThaw(1);
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.NothingThawing.selector, stranger));
        escrow.cancelThaw();
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.NothingThawing.selector, stranger));
        escrow.withdraw();
    }

    function test_startThaw_aboveBalanceOrZero_reverts() public {
        escrow.deposit(PAYER, 100);

        vm.prank(PAYER);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InsufficientBalance.selector, PAYER, 100, 101));
        escrow.startThaw(101);
        vm.prank(PAYER);
        vm.expectRevert(IUsageEscrow.ZeroAmount.selector);
        escrow.startThaw(0);
    }

    function test_startThaw_again_replacesAmountAndTime() public {
        _startThaw(100, 40);
        vm.warp(block.timestamp + THAW);

        vm.prank(PAYER);
        escrow.startThaw(70);

        vm.assertEq(escrow.thawOf(PAYER).amount, 70, "amount");
        vm.assertEq(escrow.thawOf(PAYER).endsAt, block.timestamp + THAW, "time");
    }

    function test_cancelThaw_running_commitsAgain() public {
        _startThaw(100, 40);

        vm.prank(PAYER);
        escrow.cancelThaw();

        vm.assertEq(escrow.committedOf(PAYER), 100, "committed");
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.NothingThawing.selector, PAYER));
        vm.prank(PAYER);
        escrow.withdraw();
    }

    function test_collect_thawingMoney_isTakenAndThawShrinks() public {
        _startThaw(100, 80);

        _collect(PAYER_KEY, OPERATOR_KEY, 70);

        vm.assertEq(escrow.balanceOf(PAYER), 30, "balance");
        vm.assertEq(escrow.thawOf(PAYER).amount, 30, "thaw");
        vm.assertEq(escrow.committedOf(PAYER), 0, "committed");
    }

    function test_withdraw_endedThawThenCollectedThenDeposit_takesNoNewMoney() public {
        _startThaw(100, 100);
        vm.warp(block.timestamp + THAW);
        _collect(PAYER_KEY, OPERATOR_KEY, 100);
        escrow.deposit(PAYER, 50);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.NothingThawing.selector, PAYER));
        vm.prank(PAYER);
        escrow.withdraw();
    }

    /* COLLECT */

    function testFuzz_collect_twice_paysDifference(uint96 first, uint96 second, uint96 promised) public {
        first = uint96(_bound(first, 1, type(uint96).max - 1));
        second = uint96(_bound(second, first + 1, type(uint96).max));
        promised = uint96(_bound(promised, second, type(uint96).max));
        escrow.deposit(PAYER, second);
        IUsageEscrow.Voucher memory voucher = _voucher(PAYER, OPERATOR, promised);
        bytes memory signature = _signVoucher(PAYER_KEY, voucher);

        escrow.collect(voucher, signature, first, _signCollection(OPERATOR_KEY, PAYER, OPERATOR, first));
        vm.expectEmit(address(escrow));
        emit IUsageEscrow.Collected(PAYER, OPERATOR, second, second - first);
        escrow.collect(voucher, signature, second, _signCollection(OPERATOR_KEY, PAYER, OPERATOR, second));

        vm.assertEq(escrow.collected(PAYER, OPERATOR), second, "collected");
        vm.assertEq(escrow.balanceOf(PAYER), 0, "balance");
        vm.assertEq(rewards.funded(OPERATOR), second, "funded");
        vm.assertEq(rewards.funded(OTHER), 0, "other operator");
        vm.assertEq(token.balanceOf(address(rewards)), second, "tokens");
    }

    function test_collect_replayed_reverts() public {
        escrow.deposit(PAYER, 100);
        _collect(PAYER_KEY, OPERATOR_KEY, 60);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, FAR);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.NothingToCollect.selector, 60, 60));
        escrow.collect(voucher, payers, 60, operators);
    }

    function test_collect_lessThanBefore_reverts() public {
        escrow.deposit(PAYER, 100);
        _collect(PAYER_KEY, OPERATOR_KEY, 60);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(59, FAR);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.NothingToCollect.selector, 59, 60));
        escrow.collect(voucher, payers, 59, operators);
    }

    function test_collect_nothingUsed_reverts() public {
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(0, FAR);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.NothingToCollect.selector, 0, 0));
        escrow.collect(voucher, payers, 0, operators);
    }

    function test_collect_aboveVoucher_reverts() public {
        escrow.deposit(PAYER, 100);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers,) = _signed(60, FAR);
        bytes memory operators = _signCollection(OPERATOR_KEY, PAYER, OPERATOR, 61);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.UsedAboveVoucher.selector, 61, 60));
        escrow.collect(voucher, payers, 61, operators);
    }

    function test_collect_atDeadline_paysAndOneSecondLaterReverts() public {
        escrow.deposit(PAYER, 100);
        uint64 deadline = uint64(block.timestamp + 10);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, deadline);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.VoucherExpired.selector, deadline, deadline + 1));
        escrow.collect(voucher, payers, 60, operators);

        vm.warp(deadline);
        escrow.collect(voucher, payers, 60, operators);

        vm.assertEq(rewards.funded(OPERATOR), 60, "funded");
    }

    function test_collect_aboveBalance_reverts() public {
        escrow.deposit(PAYER, 59);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, FAR);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InsufficientBalance.selector, PAYER, 59, 60));
        escrow.collect(voucher, payers, 60, operators);
    }

    function test_collect_wrongSigners_reverts() public {
        escrow.deposit(PAYER, 100);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, FAR);
        bytes memory othersVoucher = _signVoucher(OTHER_KEY, voucher);
        bytes memory othersCollection = _signCollection(OTHER_KEY, PAYER, OPERATOR, 60);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InvalidPayerSignature.selector, PAYER));
        escrow.collect(voucher, othersVoucher, 60, operators);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InvalidOperatorSignature.selector, OPERATOR));
        escrow.collect(voucher, payers, 60, othersCollection);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InvalidPayerSignature.selector, PAYER));
        escrow.collect(voucher, "", 60, operators);
    }

    function testFuzz_collect_changedVoucher_reverts(uint8 field, uint96 change) public {
        escrow.deposit(PAYER, 100);
        escrow.deposit(OTHER, 100);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers,) = _signed(60, FAR);
        if (field % 4 == 0) voucher.payer = OTHER;
        if (field % 4 == 1) voucher.operator = OTHER;
        if (field % 4 == 2) voucher.cumulative += _bound(change, 1, type(uint96).max);
        if (field % 4 == 3) voucher.deadline -= uint64(_bound(change, 1, 1e9));
        uint256 operatorKey = field % 4 == 1 ? OTHER_KEY : OPERATOR_KEY;
        bytes memory operators = _signCollection(operatorKey, voucher.payer, voucher.operator, 60);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InvalidPayerSignature.selector, voucher.payer));
        escrow.collect(voucher, payers, 60, operators);
    }

    function test_collect_signedForAnotherChain_reverts() public {
        escrow.deposit(PAYER, 100);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, FAR);
        vm.chainId(block.chainid + 1);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InvalidPayerSignature.selector, PAYER));
        escrow.collect(voucher, payers, 60, operators);
    }

    function test_collect_signedForAnotherEscrow_reverts() public {
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, FAR);
        (UsageEscrow second,) = _deploy(token);
        token.approve(address(second), 100);
        second.deposit(PAYER, 100);

        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InvalidPayerSignature.selector, PAYER));
        second.collect(voucher, payers, 60, operators);
    }

    function test_collect_contractPayer_paysWhileItApproves() public {
        ContractAccount payer = new ContractAccount();
        escrow.deposit(address(payer), 100);
        IUsageEscrow.Voucher memory voucher = _voucher(address(payer), OPERATOR, 60);
        bytes memory operators = _signCollection(OPERATOR_KEY, address(payer), OPERATOR, 60);
        vm.expectRevert(abi.encodeWithSelector(IUsageEscrow.InvalidPayerSignature.selector, address(payer)));
        escrow.collect(voucher, "any", 60, operators);

        payer.approve(_voucherDigest(voucher));
        escrow.collect(voucher, "any", 60, operators);

        vm.assertEq(rewards.funded(OPERATOR), 60, "funded");
    }

    function test_collect_payerDelegatesToRefuser_stillPays() public {
        escrow.deposit(PAYER, 100);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, FAR);
        vm.etch(PAYER, address(new Refuser()).code);

        escrow.collect(voucher, payers, 60, operators);

        vm.assertEq(rewards.funded(OPERATOR), 60, "funded");
    }

    function test_collect_tokenStartsToKeepFee_reverts() public {
        FeeToken feeToken = new FeeToken();
        (escrow, rewards) = _deploy(feeToken);
        feeToken.approve(address(escrow), 1000);
        escrow.deposit(PAYER, 1000);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(1000, FAR);
        feeToken.charge();

        vm.expectRevert(abi.encodeWithSelector(ExactTransfer.InexactTransfer.selector, 1000, 990));
        escrow.collect(voucher, payers, 1000, operators);
    }

    function test_collect_reentrantToken_cannotEnterAgain() public {
        ReentrantToken hostile = new ReentrantToken();
        (escrow, rewards) = _deploy(hostile);
        hostile.approve(address(escrow), 100);
        escrow.deposit(PAYER, 100);
        (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators) = _signed(60, FAR);
        hostile.arm(address(escrow), abi.encodeCall(IUsageEscrow.collect, (voucher, payers, 60, operators)));

        escrow.collect(voucher, payers, 60, operators);

        _assertGuardHeld(hostile);
        vm.assertEq(rewards.funded(OPERATOR), 60, "funded");
    }

    /* INTERNAL */

    function _startThaw(uint256 deposited, uint256 thawed) internal {
        escrow.deposit(PAYER, deposited);
        vm.prank(PAYER);
        escrow.startThaw(thawed);
    }

    function _signed(uint256 cumulative, uint64 deadline)
        internal
        view
        returns (IUsageEscrow.Voucher memory voucher, bytes memory payers, bytes memory operators)
    {
        voucher = IUsageEscrow.Voucher(PAYER, OPERATOR, cumulative, deadline);
        payers = _signVoucher(PAYER_KEY, voucher);
        operators = _signCollection(OPERATOR_KEY, PAYER, OPERATOR, cumulative);
    }

    function _voucherDigest(IUsageEscrow.Voucher memory v) internal view returns (bytes32) {
        bytes32 structHash =
            keccak256(abi.encode(escrow.VOUCHER_TYPEHASH(), v.payer, v.operator, v.cumulative, v.deadline));
        return keccak256(abi.encodePacked("\x19\x01", _domain("OpenLoRA UsageEscrow", address(escrow)), structHash));
    }

    function _assertGuardHeld(ReentrantToken hostile) internal view {
        vm.assertTrue(hostile.wasCalled() && !hostile.hasSucceeded(), "called back and refused");
        bytes memory expected = abi.encodeWithSelector(ReentrancyGuard.ReentrancyGuardReentrantCall.selector);
        vm.assertEq(hostile.answer(), expected, "guard");
    }
}
