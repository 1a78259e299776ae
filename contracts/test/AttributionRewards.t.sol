// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AttributionRewards} from "../src/AttributionRewards.sol";
import {IAttributionRewards} from "../src/interfaces/IAttributionRewards.sol";
import {IGuarded} from "../src/interfaces/IGuarded.sol";
import {Base} from "./Base.sol";
import {ReentrantToken} from "./Doubles.sol";
import {MerkleTree} from "./MerkleTree.sol";
import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {Hashes} from "@openzeppelin/contracts/utils/cryptography/Hashes.sol";

contract AttributionRewardsTest is Base {
    using MerkleTree for bytes32[];

    bytes32[] private _noProof;

    /* CONSTRUCTION */

    function test_constructor_badArguments_reverts() public {
        uint64 limit = rewards.MAX_CHALLENGE_DELAY();
        vm.expectRevert(IAttributionRewards.ZeroAddress.selector);
        new AttributionRewards(IERC20(address(0)), address(1), DELAY, GUARDIAN);
        vm.expectRevert(IAttributionRewards.ZeroAddress.selector);
        new AttributionRewards(token, address(0), DELAY, GUARDIAN);
        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.DelayOutOfRange.selector, 0, limit));
        new AttributionRewards(token, address(1), 0, GUARDIAN);
        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.DelayOutOfRange.selector, limit + 1, limit));
        new AttributionRewards(token, address(1), limit + 1, GUARDIAN);
        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableInvalidOwner.selector, address(0)));
        new AttributionRewards(token, address(1), DELAY, address(0));
    }

    /* FUND */

    function testFuzz_fund_notEscrow_reverts(address caller) public {
        vm.assume(caller != address(escrow));

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.NotEscrow.selector, caller));
        vm.prank(caller);
        rewards.fund(OPERATOR, 1);
    }

    /* SUBMIT */

    function test_submitEpoch_signed_storesAndTellsEverything() public {
        _fundOperator(OPERATOR_KEY, 100);
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, keccak256("root"), 90);
        uint64 activatesAt = uint64(block.timestamp) + DELAY;
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);

        vm.expectEmit(address(rewards));
        emit IAttributionRewards.EpochSubmitted(
            OPERATOR, 0, epoch.root, epoch.receiptsRoot, epoch.leavesHash, 90, activatesAt
        );
        rewards.submitEpoch(epoch, signature);

        IAttributionRewards.EpochRecord memory stored = rewards.epochOf(OPERATOR, 0);
        vm.assertEq(
            abi.encode(stored),
            abi.encode(IAttributionRewards.EpochRecord(epoch.root, 90, activatesAt, false)),
            "record"
        );
        vm.assertEq(rewards.epochCount(OPERATOR), 1, "queue");
        vm.assertEq(rewards.epochCount(OTHER), 0, "other queue");
    }

    function test_submitEpoch_replayed_reverts() public {
        _fundOperator(OPERATOR_KEY, 100);
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, keccak256("root"), 90);
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);
        rewards.submitEpoch(epoch, signature);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.EpochOutOfOrder.selector, OPERATOR, 0, 1));
        rewards.submitEpoch(epoch, signature);
    }

    function test_submitEpoch_aheadOfQueue_reverts() public {
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, keccak256("root"), 0);
        epoch.epochId = 1;
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.EpochOutOfOrder.selector, OPERATOR, 1, 0));
        rewards.submitEpoch(epoch, signature);
    }

    function test_submitEpoch_zeroRoot_reverts() public {
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, 0, 0);
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);

        vm.expectRevert(IAttributionRewards.ZeroRoot.selector);
        rewards.submitEpoch(epoch, signature);
    }

    function test_submitEpoch_aboveFunded_reverts() public {
        _fundOperator(OPERATOR_KEY, 100);
        _fundOperator(OTHER_KEY, 1000);
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, keccak256("root"), 101);
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.TotalAboveFunded.selector, 101, 100));
        rewards.submitEpoch(epoch, signature);
    }

    function test_submitEpoch_decreasingTotal_reverts() public {
        _fundOperator(OPERATOR_KEY, 100);
        _submit(OPERATOR_KEY, keccak256("root"), 50);
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, keccak256("root"), 49);
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.TotalDecreased.selector, 49, 50));
        rewards.submitEpoch(epoch, signature);
    }

    function test_submitEpoch_afterVoidedInflation_mayReturnToHonestTotal() public {
        _fundOperator(OPERATOR_KEY, 100);
        _submit(OPERATOR_KEY, keccak256("honest"), 20);
        _void(OPERATOR, _submit(OPERATOR_KEY, keccak256("inflated"), 100));
        _void(OPERATOR, _submit(OPERATOR_KEY, keccak256("inflated again"), 100));

        uint256 epochId = _submit(OPERATOR_KEY, keccak256("corrected"), 20);

        vm.assertEq(rewards.epochOf(OPERATOR, epochId).totalCumulative, 20, "total");
    }

    function testFuzz_submitEpoch_changedOrForged_reverts(uint8 field, uint256 change) public {
        _fundOperator(OPERATOR_KEY, 100);
        _fundOperator(OTHER_KEY, 100);
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, keccak256("root"), 50);
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);
        if (field % 6 == 0) epoch.operator = OTHER;
        if (field % 6 == 1) epoch.root = keccak256(abi.encode(change));
        if (field % 6 == 2) epoch.receiptsRoot = keccak256(abi.encode(change));
        if (field % 6 == 3) epoch.leavesHash = keccak256(abi.encode(change));
        if (field % 6 == 4) epoch.totalCumulative = _bound(change, 51, 100);
        if (field % 6 == 5) signature = _signEpoch(OTHER_KEY, epoch);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.InvalidOperatorSignature.selector, epoch.operator));
        rewards.submitEpoch(epoch, signature);
    }

    function test_submitEpoch_signedForAnotherChain_reverts() public {
        _fundOperator(OPERATOR_KEY, 100);
        IAttributionRewards.Epoch memory epoch = _epoch(OPERATOR, keccak256("root"), 50);
        bytes memory signature = _signEpoch(OPERATOR_KEY, epoch);
        vm.chainId(block.chainid + 1);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.InvalidOperatorSignature.selector, OPERATOR));
        rewards.submitEpoch(epoch, signature);
    }

    /* VOID */

    function testFuzz_voidEpoch_notGuardian_reverts(address caller) public {
        vm.assume(caller != GUARDIAN);
        _submit(OPERATOR_KEY, keccak256("root"), 0);

        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, caller));
        vm.prank(caller);
        rewards.voidEpoch(OPERATOR, 0);
    }

    function test_voidEpoch_lastSecond_neverPays() public {
        (bytes32[] memory leaves,) = _pendingPair(60, 40);
        vm.warp(rewards.epochOf(OPERATOR, 0).activatesAt - 1);
        _void(OPERATOR, 0);
        vm.warp(block.timestamp + 365 days);

        bytes memory expected = abi.encodeWithSelector(IAttributionRewards.EpochIsVoid.selector, OPERATOR, 0);
        vm.expectRevert(expected);
        rewards.claim(OPERATOR, 0, _account(0), 60, leaves.proof(0));
        vm.expectRevert(expected);
        rewards.claimMany(OPERATOR, 0, _claims(leaves, _pair(60, 40)));
    }

    function test_voidEpoch_activeOrVoidOrUnknown_reverts() public {
        _submit(OPERATOR_KEY, keccak256("root"), 0);
        uint64 activatesAt = rewards.epochOf(OPERATOR, 0).activatesAt;
        vm.warp(activatesAt);
        vm.prank(GUARDIAN);
        vm.expectRevert(
            abi.encodeWithSelector(IAttributionRewards.EpochAlreadyActive.selector, OPERATOR, 0, activatesAt)
        );
        rewards.voidEpoch(OPERATOR, 0);

        _void(OPERATOR, _submit(OPERATOR_KEY, keccak256("root"), 0));
        vm.prank(GUARDIAN);
        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.EpochIsVoid.selector, OPERATOR, 1));
        rewards.voidEpoch(OPERATOR, 1);

        vm.prank(GUARDIAN);
        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.UnknownEpoch.selector, OPERATOR, 2));
        rewards.voidEpoch(OPERATOR, 2);
    }

    /* CLAIM */

    function testFuzz_claim_everyLeafOfAnyTree_paysItsAccount(uint8 countSeed, uint256 seed) public {
        uint256 count = _bound(countSeed, 1, 20);
        uint256[] memory earned = new uint256[](count);
        uint256 total;
        for (uint256 i = 0; i < count; i++) {
            earned[i] = _bound(uint256(keccak256(abi.encode(seed, i))), 1, 1e18);
            total += earned[i];
        }
        bytes32[] memory leaves = _leaves(OPERATOR, earned);
        _fundOperator(OPERATOR_KEY, total);
        _activate(OPERATOR_KEY, leaves.root(), total);

        for (uint256 i = 0; i < count; i++) {
            rewards.claim(OPERATOR, 0, _account(i), earned[i], leaves.proof(i));
            vm.assertEq(token.balanceOf(_account(i)), earned[i], "account");
        }

        vm.assertEq(rewards.paid(OPERATOR), total, "paid");
        vm.assertEq(token.balanceOf(address(rewards)), 0, "left");
    }

    function test_claim_laterEpoch_paysDifferenceAndSkippedEpochCostsNothing() public {
        (bytes32[] memory leaves,) = _activePair(60, 40);
        rewards.claim(OPERATOR, 0, _account(0), 60, leaves.proof(0));
        leaves = _nextPair(75, 125);

        vm.expectEmit(address(rewards));
        emit IAttributionRewards.Claimed(OPERATOR, _account(0), 1, 15, 75);
        rewards.claim(OPERATOR, 1, _account(0), 75, leaves.proof(0));
        rewards.claim(OPERATOR, 1, _account(1), 125, leaves.proof(1));

        vm.assertEq(token.balanceOf(_account(0)), 75, "first");
        vm.assertEq(token.balanceOf(_account(1)), 125, "second");
        vm.assertEq(rewards.claimed(OPERATOR, _account(0)), 75, "claimed");
    }

    function test_claim_oldEpochStillActive_pays() public {
        (bytes32[] memory leaves,) = _activePair(60, 40);
        _nextPair(75, 125);

        rewards.claim(OPERATOR, 0, _account(1), 40, leaves.proof(1));

        vm.assertEq(token.balanceOf(_account(1)), 40, "second");
    }

    function test_claim_twice_reverts() public {
        (bytes32[] memory leaves,) = _activePair(60, 40);
        bytes32[] memory proof = leaves.proof(0);
        rewards.claim(OPERATOR, 0, _account(0), 60, proof);

        vm.expectRevert(
            abi.encodeWithSelector(IAttributionRewards.NothingToClaim.selector, OPERATOR, _account(0), 60, 60)
        );
        rewards.claim(OPERATOR, 0, _account(0), 60, proof);
    }

    function test_claim_beforeActivation_reverts() public {
        (bytes32[] memory leaves,) = _pendingPair(60, 40);
        uint64 activatesAt = rewards.epochOf(OPERATOR, 0).activatesAt;
        vm.warp(activatesAt - 1);
        bytes32[] memory proof = leaves.proof(0);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.EpochNotActive.selector, OPERATOR, 0, activatesAt));
        rewards.claim(OPERATOR, 0, _account(0), 60, proof);
    }

    function test_claim_unknownEpoch_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.UnknownEpoch.selector, OPERATOR, 0));
        rewards.claim(OPERATOR, 0, _account(0), 60, _noProof);
    }

    function test_claim_singleLeafTree_paysWithEmptyProof() public {
        uint256[] memory earned = new uint256[](1);
        earned[0] = 100;
        _fundOperator(OPERATOR_KEY, 100);
        _activate(OPERATOR_KEY, _leaves(OPERATOR, earned).root(), 100);

        rewards.claim(OPERATOR, 0, _account(0), 100, _noProof);

        vm.assertEq(token.balanceOf(_account(0)), 100, "account");
    }

    function testFuzz_claim_changedEntry_reverts(uint8 field, uint96 change) public {
        (bytes32[] memory leaves,) = _activePair(60, 40);
        _fundOperator(OTHER_KEY, 100);
        _activate(OTHER_KEY, leaves.root(), 100);
        (address operator, address account, uint256 cumulative) = (OPERATOR, _account(0), 60);
        if (field % 3 == 0) operator = OTHER;
        if (field % 3 == 1) account = _account(1 + _bound(change, 0, 1000));
        if (field % 3 == 2) cumulative += _bound(change, 1, type(uint96).max);
        bytes32[] memory proof = leaves.proof(0);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.InvalidProof.selector, operator, 0, account));
        rewards.claim(operator, 0, account, cumulative, proof);
    }

    function testFuzz_claim_corruptedProof_reverts(uint8 indexSeed, uint256 flip) public {
        vm.assume(flip != 0);
        (bytes32[] memory leaves, uint256[] memory earned) = _activeTree(7);
        uint256 index = _bound(indexSeed, 0, 6);
        bytes32[] memory proof = leaves.proof(index);
        uint256 place = _bound(flip, 0, proof.length - 1);
        proof[place] = bytes32(uint256(proof[place]) ^ flip);

        _expectInvalidProof(index);
        rewards.claim(OPERATOR, 0, _account(index), earned[index], proof);
    }

    function test_claim_shortenedOrLengthenedProof_reverts() public {
        (bytes32[] memory leaves, uint256[] memory earned) = _activeTree(8);
        bytes32[] memory whole = leaves.proof(3);
        bytes32[] memory short = new bytes32[](2);
        bytes32[] memory long = new bytes32[](4);
        (short[0], short[1]) = (whole[0], whole[1]);
        (long[0], long[1], long[2], long[3]) = (whole[0], whole[1], whole[2], leaves.root());

        _expectInvalidProof(3);
        rewards.claim(OPERATOR, 0, _account(3), earned[3], short);
        _expectInvalidProof(3);
        rewards.claim(OPERATOR, 0, _account(3), earned[3], long);
        _expectInvalidProof(3);
        rewards.claim(OPERATOR, 0, _account(3), earned[3], _noProof);
    }

    /// @dev With a single hash, the two children of a node could be read as an entry. The second hash forbids it.
    function test_claim_innerNodeAsLeaf_reverts() public {
        (bytes32[] memory leaves,) = _activeTree(4);
        bytes32 node = Hashes.commutativeKeccak256(leaves[0], leaves[1]);
        bytes32 sibling = Hashes.commutativeKeccak256(leaves[2], leaves[3]);
        vm.assertEq(Hashes.commutativeKeccak256(node, sibling), leaves.root(), "the node leads to the root");
        bytes32[] memory proof = new bytes32[](1);
        proof[0] = sibling;
        // The only freedom a caller has is account and amount: read the node's two children as such.
        address account = address(uint160(uint256(leaves[0])));
        uint256 cumulative = uint256(leaves[1]);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.InvalidProof.selector, OPERATOR, 0, account));
        rewards.claim(OPERATOR, 0, account, cumulative, proof);
    }

    function test_claim_leafOfAnotherChain_reverts() public {
        (bytes32[] memory leaves,) = _activePair(60, 40);
        bytes32[] memory proof = leaves.proof(0);
        vm.chainId(block.chainid + 1);

        _expectInvalidProof(0);
        rewards.claim(OPERATOR, 0, _account(0), 60, proof);
    }

    function test_claim_leafOfAnotherContract_reverts() public {
        bytes32 leaf = _leaf(block.chainid, address(0xBEEF), OPERATOR, _account(0), 100);
        _fundOperator(OPERATOR_KEY, 100);
        _activate(OPERATOR_KEY, leaf, 100);

        _expectInvalidProof(0);
        rewards.claim(OPERATOR, 0, _account(0), 100, _noProof);
    }

    function test_claim_leavesAboveTotal_stopsAtTotal() public {
        bytes32[] memory leaves = _leaves(OPERATOR, _pair(60, 70));
        _fundOperator(OPERATOR_KEY, 100);
        _fundOperator(OTHER_KEY, 1000);
        _activate(OPERATOR_KEY, leaves.root(), 100);
        rewards.claim(OPERATOR, 0, _account(0), 60, leaves.proof(0));
        bytes32[] memory proof = leaves.proof(1);

        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.PaidAboveTotal.selector, OPERATOR, 0, 130, 100));
        rewards.claim(OPERATOR, 0, _account(1), 70, proof);
    }

    function test_claim_sameAccountTwiceInTree_paysLargerNotSum() public {
        bytes32[] memory leaves = new bytes32[](2);
        leaves[0] = _leaf(block.chainid, address(rewards), OPERATOR, _account(0), 30);
        leaves[1] = _leaf(block.chainid, address(rewards), OPERATOR, _account(0), 50);
        _fundOperator(OPERATOR_KEY, 80);
        _activate(OPERATOR_KEY, leaves.root(), 80);

        rewards.claim(OPERATOR, 0, _account(0), 30, leaves.proof(0));
        rewards.claim(OPERATOR, 0, _account(0), 50, leaves.proof(1));

        vm.assertEq(token.balanceOf(_account(0)), 50, "account");
    }

    function test_claim_reentrantToken_paysOnce() public {
        ReentrantToken hostile = new ReentrantToken();
        (escrow, rewards) = _deploy(hostile);
        hostile.approve(address(escrow), type(uint256).max);
        (bytes32[] memory leaves,) = _activePair(60, 40);
        bytes32[] memory proof = leaves.proof(0);
        hostile.arm(address(rewards), abi.encodeCall(rewards.claim, (OPERATOR, 0, _account(0), 60, proof)));

        rewards.claim(OPERATOR, 0, _account(0), 60, proof);

        vm.assertTrue(hostile.wasCalled() && !hostile.hasSucceeded(), "called back and refused");
        vm.assertEq(hostile.balanceOf(_account(0)), 60, "account");
        vm.assertEq(rewards.paid(OPERATOR), 60, "paid");
    }

    /* CLAIM MANY */

    function test_claimMany_oneAlreadyClaimed_skipsIt() public {
        (bytes32[] memory leaves, uint256[] memory earned) = _activePair(60, 40);
        rewards.claim(OPERATOR, 0, _account(0), 60, leaves.proof(0));

        uint256 paidAmount = rewards.claimMany(OPERATOR, 0, _claims(leaves, earned));

        vm.assertEq(paidAmount, 40, "paid now");
        vm.assertEq(token.balanceOf(_account(0)), 60, "first");
        vm.assertEq(token.balanceOf(_account(1)), 40, "second");
        vm.assertEq(rewards.claimMany(OPERATOR, 0, _claims(leaves, earned)), 0, "paid again");
    }

    function test_claimMany_oneBadProof_revertsAll() public {
        (bytes32[] memory leaves, uint256[] memory earned) = _activePair(60, 40);
        IAttributionRewards.Claim[] memory claims = _claims(leaves, earned);
        claims[1].cumulative = 41;

        _expectInvalidProof(1);
        rewards.claimMany(OPERATOR, 0, claims);

        vm.assertEq(token.balanceOf(_account(0)), 0, "first");
    }

    /* GUARDIAN */

    function test_guardian_transfer_needsAcceptance() public {
        vm.prank(GUARDIAN);
        rewards.transferOwnership(OTHER);
        vm.assertEq(rewards.guardian(), GUARDIAN, "not yet");

        vm.prank(OTHER);
        rewards.acceptOwnership();

        vm.assertEq(rewards.guardian(), OTHER, "accepted");
    }

    function test_guardian_renounce_reverts() public {
        vm.prank(GUARDIAN);
        vm.expectRevert(IGuarded.GuardianRequired.selector);
        rewards.renounceOwnership();
    }

    /* INTERNAL */

    function _pendingPair(uint256 first, uint256 second)
        internal
        returns (bytes32[] memory leaves, uint256[] memory earned)
    {
        earned = _pair(first, second);
        leaves = _leaves(OPERATOR, earned);
        _fundOperator(OPERATOR_KEY, first + second);
        _submit(OPERATOR_KEY, leaves.root(), first + second);
    }

    function _activePair(uint256 first, uint256 second)
        internal
        returns (bytes32[] memory leaves, uint256[] memory earned)
    {
        (leaves, earned) = _pendingPair(first, second);
        vm.warp(block.timestamp + DELAY);
    }

    function _nextPair(uint256 first, uint256 second) internal returns (bytes32[] memory leaves) {
        leaves = _leaves(OPERATOR, _pair(first, second));
        _fundOperator(OPERATOR_KEY, first + second - rewards.funded(OPERATOR));
        _activate(OPERATOR_KEY, leaves.root(), first + second);
    }

    function _activeTree(uint256 count) internal returns (bytes32[] memory leaves, uint256[] memory earned) {
        earned = new uint256[](count);
        for (uint256 i = 0; i < count; i++) {
            earned[i] = 10 + i;
        }
        leaves = _leaves(OPERATOR, earned);
        _fundOperator(OPERATOR_KEY, 1000);
        _activate(OPERATOR_KEY, leaves.root(), 1000);
    }

    function _claims(bytes32[] memory leaves, uint256[] memory earned)
        internal
        pure
        returns (IAttributionRewards.Claim[] memory claims)
    {
        claims = new IAttributionRewards.Claim[](leaves.length);
        for (uint256 i = 0; i < claims.length; i++) {
            claims[i] = IAttributionRewards.Claim(_account(i), earned[i], leaves.proof(i));
        }
    }

    function _void(address operator, uint256 epochId) internal {
        vm.prank(GUARDIAN);
        rewards.voidEpoch(operator, epochId);
    }

    function _expectInvalidProof(uint256 index) internal {
        vm.expectRevert(abi.encodeWithSelector(IAttributionRewards.InvalidProof.selector, OPERATOR, 0, _account(index)));
    }
}
