// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {ExactTransfer} from "./ExactTransfer.sol";
import {Signatures} from "./Signatures.sol";
import {IAttributionRewards} from "./interfaces/IAttributionRewards.sol";
import {IUsageEscrow} from "./interfaces/IUsageEscrow.sol";
import {IERC20, SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuard} from "@openzeppelin/contracts/utils/ReentrancyGuard.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";

/// @title UsageEscrow
/// @notice See `IUsageEscrow`.
contract UsageEscrow is IUsageEscrow, EIP712, ReentrancyGuard {
    using SafeERC20 for IERC20;
    using ExactTransfer for IERC20;

    /* CONSTANTS */

    bytes32 public constant VOUCHER_TYPEHASH =
        keccak256("Voucher(address payer,address operator,uint256 cumulative,uint64 deadline)");

    bytes32 public constant COLLECTION_TYPEHASH =
        keccak256("Collection(address payer,address operator,uint256 cumulativeUsed)");

    /// @dev Longer would be a freeze rather than a notice period.
    uint64 public constant MAX_THAW_SECONDS = 90 days;

    /* IMMUTABLES */

    /// @inheritdoc IUsageEscrow
    IERC20 public immutable TOKEN;

    /// @inheritdoc IUsageEscrow
    IAttributionRewards public immutable REWARDS;

    /// @inheritdoc IUsageEscrow
    uint64 public immutable THAW_SECONDS;

    /* STORAGE */

    /// @inheritdoc IUsageEscrow
    mapping(address payer => uint256) public balanceOf;

    /// @inheritdoc IUsageEscrow
    mapping(address payer => mapping(address operator => uint256)) public collected;

    mapping(address payer => Thaw) private _thaws;

    /* CONSTRUCTOR */

    /// @param token A plain ERC-20, the rewards' token.
    /// @param rewards Deployed before, for the address that this escrow gets.
    /// @param thawSeconds Notice period of withdrawals, 1 to `MAX_THAW_SECONDS`.
    constructor(IERC20 token, IAttributionRewards rewards, uint64 thawSeconds) EIP712("OpenLoRA UsageEscrow", "1") {
        if (thawSeconds == 0 || thawSeconds > MAX_THAW_SECONDS) revert ThawOutOfRange(thawSeconds, MAX_THAW_SECONDS);
        if (rewards.ESCROW() != address(this)) revert RewardsEscrowMismatch(rewards.ESCROW(), address(this));
        if (rewards.TOKEN() != token) revert RewardsTokenMismatch(address(rewards.TOKEN()), address(token));

        TOKEN = token;
        REWARDS = rewards;
        THAW_SECONDS = thawSeconds;
    }

    /* EXTERNAL: ANYONE */

    /// @inheritdoc IUsageEscrow
    function deposit(address payer, uint256 amount) external nonReentrant {
        if (payer == address(0)) revert ZeroAddress();
        if (amount == 0) revert ZeroAmount();

        balanceOf[payer] += amount;

        emit Deposited(msg.sender, payer, amount);

        TOKEN.pull(msg.sender, amount);
    }

    /// @inheritdoc IUsageEscrow
    function collect(
        Voucher calldata voucher,
        bytes calldata payerSignature,
        uint256 cumulativeUsed,
        bytes calldata operatorSignature
    ) external nonReentrant {
        (address payer, address operator) = (voucher.payer, voucher.operator);
        uint256 collectedBefore = collected[payer][operator];
        if (block.timestamp > voucher.deadline) revert VoucherExpired(voucher.deadline, block.timestamp);
        if (cumulativeUsed > voucher.cumulative) revert UsedAboveVoucher(cumulativeUsed, voucher.cumulative);
        if (cumulativeUsed <= collectedBefore) revert NothingToCollect(cumulativeUsed, collectedBefore);
        if (!Signatures.isValid(payer, _voucherDigest(voucher), payerSignature)) revert InvalidPayerSignature(payer);
        if (!Signatures.isValid(operator, _collectionDigest(payer, operator, cumulativeUsed), operatorSignature)) {
            revert InvalidOperatorSignature(operator);
        }

        uint256 amount = cumulativeUsed - collectedBefore;
        collected[payer][operator] = cumulativeUsed;
        _debit(payer, amount);

        emit Collected(payer, operator, cumulativeUsed, amount);

        TOKEN.push(address(REWARDS), amount);
        REWARDS.fund(operator, amount);
    }

    /* EXTERNAL: PAYER */

    /// @inheritdoc IUsageEscrow
    function startThaw(uint256 amount) external {
        if (amount == 0) revert ZeroAmount();
        uint256 balance = balanceOf[msg.sender];
        if (amount > balance) revert InsufficientBalance(msg.sender, balance, amount);

        // The cast is safe: block times fit 64 bits.
        uint64 endsAt = uint64(block.timestamp) + THAW_SECONDS;
        _thaws[msg.sender] = Thaw(amount, endsAt);

        emit ThawStarted(msg.sender, amount, endsAt);
    }

    /// @inheritdoc IUsageEscrow
    function cancelThaw() external {
        uint256 amount = _thaws[msg.sender].amount;
        if (amount == 0) revert NothingThawing(msg.sender);

        delete _thaws[msg.sender];

        emit ThawCancelled(msg.sender, amount);
    }

    /// @inheritdoc IUsageEscrow
    function withdraw() external nonReentrant {
        Thaw memory thaw = _thaws[msg.sender];
        if (thaw.amount == 0) revert NothingThawing(msg.sender);
        if (block.timestamp < thaw.endsAt) revert StillThawing(thaw.endsAt, block.timestamp);

        delete _thaws[msg.sender];
        balanceOf[msg.sender] -= thaw.amount;

        emit Withdrawn(msg.sender, thaw.amount);

        TOKEN.safeTransfer(msg.sender, thaw.amount);
    }

    /* EXTERNAL: VIEWS */

    /// @inheritdoc IUsageEscrow
    function committedOf(address payer) external view returns (uint256) {
        return balanceOf[payer] - _thaws[payer].amount;
    }

    /// @inheritdoc IUsageEscrow
    function thawOf(address payer) external view returns (Thaw memory) {
        return _thaws[payer];
    }

    /* INTERNAL */

    /// @dev Takes `amount` for a collection. What is left of a thaw never exceeds the balance; otherwise an old, ended
    /// thaw could carry later deposits away without notice.
    function _debit(address payer, uint256 amount) internal {
        uint256 balance = balanceOf[payer];
        if (amount > balance) revert InsufficientBalance(payer, balance, amount);

        uint256 left = balance - amount;
        balanceOf[payer] = left;
        if (_thaws[payer].amount > left) {
            if (left == 0) delete _thaws[payer];
            else _thaws[payer].amount = left;
        }
    }

    function _voucherDigest(Voucher calldata voucher) internal view returns (bytes32) {
        return _hashTypedDataV4(
            keccak256(
                abi.encode(VOUCHER_TYPEHASH, voucher.payer, voucher.operator, voucher.cumulative, voucher.deadline)
            )
        );
    }

    function _collectionDigest(address payer, address operator, uint256 cumulativeUsed)
        internal
        view
        returns (bytes32)
    {
        return _hashTypedDataV4(keccak256(abi.encode(COLLECTION_TYPEHASH, payer, operator, cumulativeUsed)));
    }
}
