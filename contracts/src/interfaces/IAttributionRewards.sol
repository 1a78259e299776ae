// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title Attribution rewards
/// @notice Pays trainers, contributors and nodes what operators' epochs say they earned.
/// @dev Every operator has its own queue of epochs and its own money: what its own payers paid it through the escrow.
/// An epoch is the root of a Merkle tree of *cumulative* earnings per account, so a skipped epoch costs nobody anything.
/// The tree: entries sorted by account, each account once; leaf = keccak256(keccak256(abi.encode(chainId, this contract,
/// operator, account, cumulative))); a parent is the keccak256 of its two children, smaller first; an odd last node
/// moves up unchanged.
interface IAttributionRewards {
    /* TYPES */

    /// @notice What an operator signs, with the EIP-712 type `Epoch(address operator,uint256 epochId,bytes32 root,
    /// bytes32 receiptsRoot,bytes32 leavesHash,uint256 totalCumulative)` (no space after the comma).
    /// @param operator Whose queue.
    /// @param epochId Must be the length of the queue: the same epoch cannot be appended twice.
    /// @param root Root of the tree of cumulative earnings.
    /// @param receiptsRoot Root over the receipts of the epoch, for auditors; not read on chain.
    /// @param leavesHash Hash of the published list of entries, for auditors; not read on chain.
    /// @param totalCumulative Sum of all entries: the operator's payments may never exceed it.
    struct Epoch {
        address operator;
        uint256 epochId;
        bytes32 root;
        bytes32 receiptsRoot;
        bytes32 leavesHash;
        uint256 totalCumulative;
    }

    /// @notice What is stored of an epoch; the event carries the rest.
    /// @param root Root of the tree.
    /// @param totalCumulative Sum of all entries.
    /// @param activatesAt Block time, in seconds, from which the epoch pays; fixed at submission.
    /// @param isVoid Whether the guardian voided it.
    struct EpochRecord {
        bytes32 root;
        uint184 totalCumulative;
        uint64 activatesAt;
        bool isVoid;
    }

    /// @notice One account's entry with its proof.
    struct Claim {
        address account;
        uint256 cumulative;
        bytes32[] proof;
    }

    /* ERRORS */

    /// @dev Thrown when an address that must name someone is zero.
    error ZeroAddress();

    /// @dev Thrown when the delay is 0 or longer than `limit` seconds.
    error DelayOutOfRange(uint64 challengeDelay, uint64 limit);

    /// @dev Thrown when `caller` is not the escrow.
    error NotEscrow(address caller);

    /// @dev Thrown when `epochId` is not the length of the queue.
    error EpochOutOfOrder(address operator, uint256 epochId, uint256 expected);

    /// @dev Thrown when the root is zero: nothing can be proven against it honestly.
    error ZeroRoot();

    /// @dev Thrown when the total falls below that of the last epoch that is not void.
    error TotalDecreased(uint256 totalCumulative, uint256 previous);

    /// @dev Thrown when an epoch allocates more than the operator's payers paid.
    error TotalAboveFunded(uint256 totalCumulative, uint256 funded);

    /// @dev Thrown when `operator` did not sign the epoch.
    error InvalidOperatorSignature(address operator);

    /// @dev Thrown when there is no such epoch.
    error UnknownEpoch(address operator, uint256 epochId);

    /// @dev Thrown when the epoch was voided.
    error EpochIsVoid(address operator, uint256 epochId);

    /// @dev Thrown when the epoch pays already and can no longer be voided.
    error EpochAlreadyActive(address operator, uint256 epochId, uint64 activatesAt);

    /// @dev Thrown when the epoch does not pay yet.
    error EpochNotActive(address operator, uint256 epochId, uint64 activatesAt);

    /// @dev Thrown when the entry is not in the tree.
    error InvalidProof(address operator, uint256 epochId, address account);

    /// @dev Thrown when `cumulative` is not above what was claimed before.
    error NothingToClaim(address operator, address account, uint256 cumulative, uint256 claimed);

    /// @dev Thrown when payments would exceed the epoch's own total.
    error PaidAboveTotal(address operator, uint256 epochId, uint256 paid, uint256 totalCumulative);

    /* EVENTS */

    /// @notice The escrow brought `amount` for `operator`.
    event Funded(address indexed operator, uint256 amount, uint256 funded);

    /// @notice An epoch was appended; it pays from `activatesAt` on.
    event EpochSubmitted(
        address indexed operator,
        uint256 indexed epochId,
        bytes32 indexed root,
        bytes32 receiptsRoot,
        bytes32 leavesHash,
        uint256 totalCumulative,
        uint64 activatesAt
    );

    /// @notice The guardian voided an epoch; it will never pay.
    event EpochVoided(address indexed operator, uint256 indexed epochId);

    /// @notice `account` received `amount`, proven by epoch `epochId`.
    event Claimed(
        address indexed operator, address indexed account, uint256 indexed epochId, uint256 amount, uint256 claimed
    );

    /* FUNCTIONS */

    /// @notice Books `amount`, which has just arrived, for `operator`; escrow only.
    function fund(address operator, uint256 amount) external;

    /// @notice Appends an epoch to its operator's queue.
    /// @dev Anyone may send it with the operator's signature.
    function submitEpoch(Epoch calldata epoch, bytes calldata operatorSignature) external;

    /// @notice Voids an epoch that does not pay yet; guardian only; cannot be undone.
    /// @dev Later epochs stand: trees are cumulative, so one that repeats the fault must be voided too.
    function voidEpoch(address operator, uint256 epochId) external;

    /// @notice Pays `account` what it has earned and not yet received, by any active epoch of `operator`.
    /// @dev Anyone may send it; the money goes to `account` only. Prefer the newest active epoch: payments proven by
    /// newer epochs use up an older one's total.
    function claim(address operator, uint256 epochId, address account, uint256 cumulative, bytes32[] calldata proof)
        external;

    /// @notice `claim` for several accounts; entries already paid are skipped, so that nobody can spoil a batch by
    /// claiming first. Any other fault reverts the whole batch.
    /// @return paidAmount Sum of what was paid.
    function claimMany(address operator, uint256 epochId, Claim[] calldata claims) external returns (uint256 paidAmount);

    /// @notice The one token of this contract.
    function TOKEN() external view returns (IERC20);

    /// @notice The only source of money.
    function ESCROW() external view returns (address);

    /// @notice Seconds between submission and activation of every epoch.
    function CHALLENGE_DELAY() external view returns (uint64);

    /// @notice Everything that payers paid `operator` so far; never falls.
    function funded(address operator) external view returns (uint256);

    /// @notice Everything paid out of the money of `operator` so far; never above `funded`.
    function paid(address operator) external view returns (uint256);

    /// @notice Everything that `account` received from `operator` so far; never falls.
    function claimed(address operator, address account) external view returns (uint256);

    /// @notice Length of the operator's queue: the id of its next epoch.
    function epochCount(address operator) external view returns (uint256);

    /// @notice What is stored of an epoch.
    function epochOf(address operator, uint256 epochId) external view returns (EpochRecord memory);

    /// @notice The leaf of an entry on this chain and contract.
    function leafOf(address operator, address account, uint256 cumulative) external view returns (bytes32);
}
