// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AttributionRewards} from "../src/AttributionRewards.sol";
import {TestToken} from "../src/TestToken.sol";
import {UsageEscrow} from "../src/UsageEscrow.sol";
import {IAttributionRewards} from "../src/interfaces/IAttributionRewards.sol";
import {IUsageEscrow} from "../src/interfaces/IUsageEscrow.sol";
import {Base} from "./Base.sol";
import {MerkleTree} from "./MerkleTree.sol";

/// @notice Random but meaningful calls of two payers, two operators, three accounts, a guardian and strangers.
/// Operators lie: their leaves may add up to more than their totals. Every action checks what it must not touch.
contract Handler is Base {
    using MerkleTree for bytes32[];

    uint256 internal constant ACCOUNTS = 3;

    uint256[2] internal payerKeys = [uint256(0xA11CE), 0xA11CF];
    uint256[2] internal operatorKeys = [uint256(0x0B0B), 0x0B0C];

    /// @notice What went in, out and on, by payer.
    mapping(address payer => uint256) public depositedSum;
    mapping(address payer => uint256) public withdrawnSum;
    mapping(address payer => uint256) public collectedSum;

    /// @notice Largest total of the epochs of an operator that have paid.
    mapping(address operator => uint256) public largestPayingTotal;

    /// @notice How often each action went through, so that a run can be seen to do something.
    mapping(bytes4 action => uint256) public successes;

    /// @notice How many claims paid an account that had been paid before.
    uint256 public repeatedClaims;

    /// @dev Entries of every epoch, as the operator published them.
    mapping(address operator => mapping(uint256 epochId => uint256[])) internal entries;

    constructor(TestToken paymentToken, UsageEscrow usageEscrow, AttributionRewards attributionRewards) {
        (token, escrow, rewards) = (paymentToken, usageEscrow, attributionRewards);
        token.approve(address(escrow), type(uint256).max);
    }

    function setUp() public override {}

    /* ACTIONS: MONEY IN AND BACK */

    function deposit(uint256 payerSeed, uint96 amount) external {
        address payer = payerAt(payerSeed);
        amount = uint96(_bound(amount, 1, 1e24));
        bytes memory thawBefore = abi.encode(escrow.thawOf(payer));

        escrow.deposit(payer, amount);

        depositedSum[payer] += amount;
        successes[this.deposit.selector]++;
        vm.assertEq(abi.encode(escrow.thawOf(payer)), thawBefore, "a stranger's deposit touched a thaw");
    }

    function startThaw(uint256 payerSeed, uint96 amount) external {
        address payer = payerAt(payerSeed);
        uint256 balance = escrow.balanceOf(payer);
        if (balance == 0) return;

        vm.prank(payer);
        escrow.startThaw(_bound(amount, 1, balance));

        successes[this.startThaw.selector]++;
    }

    function cancelThaw(uint256 payerSeed) external {
        address payer = payerAt(payerSeed);
        if (escrow.thawOf(payer).amount == 0) return;

        vm.prank(payer);
        escrow.cancelThaw();
    }

    function withdraw(uint256 payerSeed) external {
        address payer = payerAt(payerSeed);
        uint256 amount = escrow.thawOf(payer).amount;
        if (amount == 0) return;
        if (block.timestamp < escrow.thawOf(payer).endsAt) vm.warp(escrow.thawOf(payer).endsAt);

        vm.prank(payer);
        escrow.withdraw();

        withdrawnSum[payer] += amount;
        successes[this.withdraw.selector]++;
    }

    /* ACTIONS: USAGE */

    function collect(uint256 payerSeed, uint256 operatorSeed, uint96 amount) external {
        address payer = payerAt(payerSeed);
        address operator = operatorAt(operatorSeed);
        if (escrow.balanceOf(payer) == 0) this.deposit(payerSeed, amount);
        uint256 taken = _bound(amount, 1, escrow.balanceOf(payer));
        IUsageEscrow.Thaw memory thawBefore = escrow.thawOf(payer);
        bytes32 others = _stateOf(operatorAt(operatorSeed % 2 + 1));

        _collect(payerKeys[payerSeed % 2], operatorKeys[operatorSeed % 2], escrow.collected(payer, operator) + taken);

        collectedSum[payer] += taken;
        successes[this.collect.selector]++;
        vm.assertLe(escrow.thawOf(payer).amount, thawBefore.amount, "a collection enlarged a thaw");
        vm.assertEq(_stateOf(operatorAt(operatorSeed % 2 + 1)), others, "a collection reached another operator");
    }

    /* ACTIONS: EPOCHS */

    function submitEpoch(uint256 operatorSeed, uint96[3] calldata earned, uint96 totalSeed, bool isHonest) external {
        address operator = operatorAt(operatorSeed);
        uint256 funded = rewards.funded(operator);
        if (funded < ACCOUNTS) return;
        uint256 epochId = rewards.epochCount(operator);
        uint256 mostEach = isHonest ? funded / ACCOUNTS : funded;
        for (uint256 i = 0; i < ACCOUNTS; i++) {
            entries[operator][epochId].push(_bound(earned[i], 1, mostEach));
        }
        uint256 total = isHonest ? funded : _bound(totalSeed, _standing(operator), funded);

        _submit(operatorKeys[operatorSeed % 2], _leaves(operator, entries[operator][epochId]).root(), total);

        successes[this.submitEpoch.selector]++;
    }

    function voidEpoch(uint256 operatorSeed, uint256 epochSeed) external {
        address operator = operatorAt(operatorSeed);
        if (rewards.epochCount(operator) == 0) return;
        uint256 epochId = epochSeed % rewards.epochCount(operator);
        IAttributionRewards.EpochRecord memory epoch = rewards.epochOf(operator, epochId);
        if (epoch.isVoid || block.timestamp >= epoch.activatesAt) return;

        vm.prank(GUARDIAN);
        rewards.voidEpoch(operator, epochId);

        successes[this.voidEpoch.selector]++;
    }

    function warp(uint16 forward) external {
        vm.warp(block.timestamp + forward);
    }

    /* ACTIONS: CLAIMS */

    /// @dev Claims for all accounts of an epoch. `isPatient` waits for its activation, so that payments are not rare.
    function claim(uint256 operatorSeed, uint256 epochSeed, bool isPatient) external {
        address operator = operatorAt(operatorSeed);
        if (rewards.epochCount(operator) == 0) return;
        uint256 epochId = epochSeed % rewards.epochCount(operator);
        bytes32 others = _stateOf(operatorAt(operatorSeed % 2 + 1));
        if (isPatient) _await(operator, epochId);

        for (uint256 i = 0; i < ACCOUNTS; i++) {
            _claimFor(operator, epochId, i);
        }

        vm.assertEq(_stateOf(operatorAt(operatorSeed % 2 + 1)), others, "a claim reached another operator");
    }

    function _claimFor(address operator, uint256 epochId, uint256 index) internal {
        uint256 claimedBefore = rewards.claimed(operator, _account(index));
        uint256 balanceBefore = token.balanceOf(_account(index));

        if (_tryClaim(operator, epochId, index)) {
            uint256 amount = entries[operator][epochId][index] - claimedBefore;
            _checkPaid(operator, epochId, index, amount, balanceBefore);
        } else {
            vm.assertEq(rewards.claimed(operator, _account(index)), claimedBefore, "a failed claim left a trace");
        }
    }

    function _tryClaim(address operator, uint256 epochId, uint256 index) internal returns (bool) {
        uint256[] memory earned = entries[operator][epochId];
        bytes32[] memory proof = _leaves(operator, earned).proof(index);
        try rewards.claim(operator, epochId, _account(index), earned[index], proof) {
            return true;
        } catch {
            return false;
        }
    }

    function _checkPaid(address operator, uint256 epochId, uint256 index, uint256 amount, uint256 balanceBefore)
        internal
    {
        IAttributionRewards.EpochRecord memory epoch = rewards.epochOf(operator, epochId);
        vm.assertTrue(!epoch.isVoid, "a void epoch paid");
        vm.assertGe(block.timestamp, epoch.activatesAt, "a pending epoch paid");
        vm.assertLe(rewards.paid(operator), epoch.totalCumulative, "paid above the epoch's total");
        vm.assertEq(token.balanceOf(_account(index)) - balanceBefore, amount, "the account got another amount");
        if (epoch.totalCumulative > largestPayingTotal[operator]) {
            largestPayingTotal[operator] = epoch.totalCumulative;
        }
        successes[this.claim.selector]++;
        if (rewards.claimed(operator, _account(index)) != amount) repeatedClaims++;
    }

    /* VIEWS */

    function payerAt(uint256 seed) public view returns (address) {
        return vm.addr(payerKeys[seed % 2]);
    }

    function operatorAt(uint256 seed) public view returns (address) {
        return vm.addr(operatorKeys[seed % 2]);
    }

    /// @notice Sum of what the accounts have claimed from `operator`.
    function claimedSum(address operator) external view returns (uint256 sum) {
        for (uint256 i = 0; i < ACCOUNTS; i++) {
            sum += rewards.claimed(operator, _account(i));
        }
    }

    function _await(address operator, uint256 epochId) internal {
        uint64 activatesAt = rewards.epochOf(operator, epochId).activatesAt;
        if (block.timestamp < activatesAt) vm.warp(activatesAt);
    }

    function _standing(address operator) internal view returns (uint256) {
        for (uint256 i = rewards.epochCount(operator); i > 0; i--) {
            IAttributionRewards.EpochRecord memory epoch = rewards.epochOf(operator, i - 1);
            if (!epoch.isVoid) return epoch.totalCumulative;
        }
        return 0;
    }

    /// @dev Everything the rewards know of an operator, in one hash.
    function _stateOf(address operator) internal view returns (bytes32) {
        return keccak256(
            abi.encode(
                rewards.funded(operator),
                rewards.paid(operator),
                rewards.epochCount(operator),
                rewards.claimed(operator, _account(0)),
                rewards.claimed(operator, _account(1)),
                rewards.claimed(operator, _account(2))
            )
        );
    }
}
