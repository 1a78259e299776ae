// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IAttributionRewards} from "./IAttributionRewards.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title Usage escrow
/// @notice Payers deposit here; operators collect what payers signed for; every collected wei goes to the rewards.
/// @dev Vouchers and collections are cumulative per (payer, operator): a lost one costs nothing, a replayed one pays
/// nothing. The token must be a plain ERC-20: one that rebases downwards breaks the books.
/// Warning: one balance covers all operators. An operator is sure only of what it has collected.
interface IUsageEscrow {
    /* TYPES */

    /// @notice What a payer allows an operator to collect.
    /// @param payer Who pays.
    /// @param operator Who served.
    /// @param cumulative Most that may ever be collected for this pair, in the token's smallest unit.
    /// @param deadline Last block time, in seconds, at which the voucher may be collected.
    struct Voucher {
        address payer;
        address operator;
        uint256 cumulative;
        uint64 deadline;
    }

    /// @notice Money that its payer is taking back.
    /// @param amount At most this much can be withdrawn; never above the payer's balance.
    /// @param endsAt Block time, in seconds, from which `withdraw` works; 0 when nothing thaws.
    struct Thaw {
        uint256 amount;
        uint64 endsAt;
    }

    /* ERRORS */

    /// @dev Thrown when an address that must name someone is zero.
    error ZeroAddress();

    /// @dev Thrown when an amount that must move something is zero.
    error ZeroAmount();

    /// @dev Thrown when the thaw is 0 or longer than `limit` seconds.
    error ThawOutOfRange(uint64 thawSeconds, uint64 limit);

    /// @dev Thrown when the rewards were built for another escrow.
    error RewardsEscrowMismatch(address rewardsEscrow, address escrow);

    /// @dev Thrown when the rewards pay in another token.
    error RewardsTokenMismatch(address rewardsToken, address token);

    /// @dev Thrown when `payer` has `balance` where `needed` is asked.
    error InsufficientBalance(address payer, uint256 balance, uint256 needed);

    /// @dev Thrown when nothing of `payer` thaws.
    error NothingThawing(address payer);

    /// @dev Thrown before the thaw ends.
    error StillThawing(uint64 endsAt, uint256 timestamp);

    /// @dev Thrown after the voucher's deadline.
    error VoucherExpired(uint64 deadline, uint256 timestamp);

    /// @dev Thrown when the operator claims more use than the payer signed for.
    error UsedAboveVoucher(uint256 cumulativeUsed, uint256 cumulative);

    /// @dev Thrown when `cumulativeUsed` is not above what was collected before.
    error NothingToCollect(uint256 cumulativeUsed, uint256 collected);

    /// @dev Thrown when `payer` did not sign the voucher.
    error InvalidPayerSignature(address payer);

    /// @dev Thrown when `operator` did not sign the collection.
    error InvalidOperatorSignature(address operator);

    /* EVENTS */

    /// @notice `sender` added `amount` to the balance of `payer`.
    event Deposited(address indexed sender, address indexed payer, uint256 amount);

    /// @notice `payer` may withdraw up to `amount` from `endsAt` on.
    event ThawStarted(address indexed payer, uint256 amount, uint64 endsAt);

    /// @notice `payer` leaves `amount` in the escrow after all.
    event ThawCancelled(address indexed payer, uint256 amount);

    /// @notice `payer` took `amount` back.
    event Withdrawn(address indexed payer, uint256 amount);

    /// @notice `amount` of `payer` went to the rewards of `operator`.
    event Collected(address indexed payer, address indexed operator, uint256 cumulativeUsed, uint256 amount);

    /* FUNCTIONS */

    /// @notice Adds `amount` of the sender's tokens, approved before, to the balance of `payer`.
    /// @dev Anyone may pay for anyone. Never touches a thaw: otherwise a stranger could hold a payer's money back.
    function deposit(address payer, uint256 amount) external;

    /// @notice Starts to take `amount` of the sender's balance back.
    /// @dev Replaces a running thaw and starts its time anew. Thawing money stays collectable until it is withdrawn.
    function startThaw(uint256 amount) external;

    /// @notice Leaves the sender's thawing money in the escrow.
    function cancelThaw() external;

    /// @notice Sends the sender its thawed money, or what collections have left of it.
    function withdraw() external;

    /// @notice Moves `cumulativeUsed` minus what was collected before from the payer's balance to the rewards.
    /// @dev Anyone may send it: both signatures are checked. The payer signs
    /// `Voucher(address payer,address operator,uint256 cumulative,uint64 deadline)`, the operator
    /// `Collection(address payer,address operator,uint256 cumulativeUsed)`. When the balance is too small the operator
    /// signs a smaller `cumulativeUsed`.
    /// Warning: a payer that is a contract (ERC-1271) can take its signature back until the voucher is collected.
    function collect(
        Voucher calldata voucher,
        bytes calldata payerSignature,
        uint256 cumulativeUsed,
        bytes calldata operatorSignature
    ) external;

    /// @notice The one token of this escrow.
    function TOKEN() external view returns (IERC20);

    /// @notice Where collected money goes.
    function REWARDS() external view returns (IAttributionRewards);

    /// @notice Seconds between `startThaw` and `withdraw`.
    function THAW_SECONDS() external view returns (uint64);

    /// @notice Balance of `payer`, thawing money included.
    function balanceOf(address payer) external view returns (uint256);

    /// @notice Balance of `payer` that it is not taking back: what an operator should give credit against.
    /// @dev Warning: a thaw that has ended stays open until it is withdrawn, cancelled, replaced or collected.
    function committedOf(address payer) external view returns (uint256);

    /// @notice Everything collected so far from `payer` for `operator`.
    function collected(address payer, address operator) external view returns (uint256);

    /// @notice The thaw of `payer`; zero when there is none.
    function thawOf(address payer) external view returns (Thaw memory);
}
