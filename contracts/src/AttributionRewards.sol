// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {Guarded} from "./Guarded.sol";
import {Signatures} from "./Signatures.sol";
import {IAttributionRewards} from "./interfaces/IAttributionRewards.sol";
import {IERC20, SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";

/// @title AttributionRewards
/// @notice See `IAttributionRewards`.
/// @dev No function needs a reentrancy guard: each writes all its effects before it calls the token.
contract AttributionRewards is IAttributionRewards, Guarded, EIP712 {
    using SafeERC20 for IERC20;
    using SafeCast for uint256;

    /* CONSTANTS */

    bytes32 public constant EPOCH_TYPEHASH = keccak256(
        "Epoch(address operator,uint256 epochId,bytes32 root,bytes32 receiptsRoot,bytes32 leavesHash,uint256 totalCumulative)"
    );

    /// @dev Longer would keep earned money from its owners rather than check it.
    uint64 public constant MAX_CHALLENGE_DELAY = 90 days;

    /* IMMUTABLES */

    /// @inheritdoc IAttributionRewards
    IERC20 public immutable TOKEN;

    /// @inheritdoc IAttributionRewards
    address public immutable ESCROW;

    /// @inheritdoc IAttributionRewards
    uint64 public immutable CHALLENGE_DELAY;

    /* STORAGE */

    /// @inheritdoc IAttributionRewards
    mapping(address operator => uint256) public funded;

    /// @inheritdoc IAttributionRewards
    mapping(address operator => uint256) public paid;

    /// @inheritdoc IAttributionRewards
    mapping(address operator => mapping(address account => uint256)) public claimed;

    mapping(address operator => EpochRecord[]) private _epochs;

    /* CONSTRUCTOR */

    /// @param token A plain ERC-20.
    /// @param escrow Address that the escrow will get; it checks the match when it is deployed.
    /// @param challengeDelay Seconds in which the guardian can void an epoch, 1 to `MAX_CHALLENGE_DELAY`.
    /// @param initialGuardian Who may void.
    constructor(IERC20 token, address escrow, uint64 challengeDelay, address initialGuardian)
        Guarded(initialGuardian)
        EIP712("OpenLoRA AttributionRewards", "1")
    {
        if (address(token) == address(0) || escrow == address(0)) revert ZeroAddress();
        if (challengeDelay == 0 || challengeDelay > MAX_CHALLENGE_DELAY) {
            revert DelayOutOfRange(challengeDelay, MAX_CHALLENGE_DELAY);
        }

        TOKEN = token;
        ESCROW = escrow;
        CHALLENGE_DELAY = challengeDelay;
    }

    /* EXTERNAL: ESCROW */

    /// @inheritdoc IAttributionRewards
    function fund(address operator, uint256 amount) external {
        if (msg.sender != ESCROW) revert NotEscrow(msg.sender);

        uint256 fundedNow = funded[operator] + amount;
        funded[operator] = fundedNow;

        emit Funded(operator, amount, fundedNow);
    }

    /* EXTERNAL: GUARDIAN */

    /// @inheritdoc IAttributionRewards
    function voidEpoch(address operator, uint256 epochId) external onlyOwner {
        EpochRecord storage epoch = _existingEpoch(operator, epochId);
        if (epoch.isVoid) revert EpochIsVoid(operator, epochId);
        if (block.timestamp >= epoch.activatesAt) revert EpochAlreadyActive(operator, epochId, epoch.activatesAt);

        epoch.isVoid = true;

        emit EpochVoided(operator, epochId);
    }

    /* EXTERNAL: ANYONE */

    /// @inheritdoc IAttributionRewards
    function submitEpoch(Epoch calldata epoch, bytes calldata operatorSignature) external {
        address operator = epoch.operator;
        EpochRecord[] storage queue = _epochs[operator];
        uint256 total = epoch.totalCumulative;
        if (epoch.epochId != queue.length) revert EpochOutOfOrder(operator, epoch.epochId, queue.length);
        if (epoch.root == 0) revert ZeroRoot();
        uint256 previousTotal = _standingTotal(queue);
        if (total < previousTotal) revert TotalDecreased(total, previousTotal);
        if (total > funded[operator]) revert TotalAboveFunded(total, funded[operator]);
        if (!Signatures.isValid(operator, _epochDigest(epoch), operatorSignature)) {
            revert InvalidOperatorSignature(operator);
        }

        // The cast is safe: block times fit 64 bits.
        uint64 activatesAt = uint64(block.timestamp) + CHALLENGE_DELAY;
        queue.push(EpochRecord(epoch.root, total.toUint184(), activatesAt, false));

        emit EpochSubmitted(
            operator, epoch.epochId, epoch.root, epoch.receiptsRoot, epoch.leavesHash, total, activatesAt
        );
    }

    /// @inheritdoc IAttributionRewards
    function claim(address operator, uint256 epochId, address account, uint256 cumulative, bytes32[] calldata proof)
        external
    {
        EpochRecord memory epoch = _activeEpoch(operator, epochId);
        uint256 claimedBefore = claimed[operator][account];
        if (cumulative <= claimedBefore) revert NothingToClaim(operator, account, cumulative, claimedBefore);

        _pay(epoch, operator, epochId, account, cumulative, claimedBefore, proof);
    }

    /// @inheritdoc IAttributionRewards
    function claimMany(address operator, uint256 epochId, Claim[] calldata claims)
        external
        returns (uint256 paidAmount)
    {
        EpochRecord memory epoch = _activeEpoch(operator, epochId);
        for (uint256 i = 0; i < claims.length; i++) {
            Claim calldata entry = claims[i];
            uint256 claimedBefore = claimed[operator][entry.account];
            if (entry.cumulative <= claimedBefore) continue;

            paidAmount += _pay(epoch, operator, epochId, entry.account, entry.cumulative, claimedBefore, entry.proof);
        }
    }

    /* EXTERNAL: VIEWS */

    /// @inheritdoc IAttributionRewards
    function epochCount(address operator) external view returns (uint256) {
        return _epochs[operator].length;
    }

    /// @inheritdoc IAttributionRewards
    function epochOf(address operator, uint256 epochId) external view returns (EpochRecord memory) {
        return _existingEpoch(operator, epochId);
    }

    /// @inheritdoc IAttributionRewards
    function leafOf(address operator, address account, uint256 cumulative) public view returns (bytes32) {
        // Hashed twice: an inner node is the hash of 64 bytes, a leaf that of 32, so neither passes for the other.
        return
            keccak256(bytes.concat(keccak256(abi.encode(block.chainid, address(this), operator, account, cumulative))));
    }

    /* INTERNAL */

    /// @dev Checks the proof and the total, books and sends. `funded` never falls and was at least the total when the
    /// epoch was submitted, so `paid <= total` keeps `paid <= funded`: a wrong root reaches no other operator's money.
    function _pay(
        EpochRecord memory epoch,
        address operator,
        uint256 epochId,
        address account,
        uint256 cumulative,
        uint256 claimedBefore,
        bytes32[] calldata proof
    ) internal returns (uint256 amount) {
        bytes32 leaf = leafOf(operator, account, cumulative);
        if (!MerkleProof.verifyCalldata(proof, epoch.root, leaf)) revert InvalidProof(operator, epochId, account);
        amount = cumulative - claimedBefore;
        uint256 paidNow = paid[operator] + amount;
        if (paidNow > epoch.totalCumulative) revert PaidAboveTotal(operator, epochId, paidNow, epoch.totalCumulative);

        paid[operator] = paidNow;
        claimed[operator][account] = cumulative;

        emit Claimed(operator, account, epochId, amount, cumulative);

        TOKEN.safeTransfer(account, amount);
    }

    function _activeEpoch(address operator, uint256 epochId) internal view returns (EpochRecord memory epoch) {
        epoch = _existingEpoch(operator, epochId);
        if (epoch.isVoid) revert EpochIsVoid(operator, epochId);
        if (block.timestamp < epoch.activatesAt) revert EpochNotActive(operator, epochId, epoch.activatesAt);
    }

    function _existingEpoch(address operator, uint256 epochId) internal view returns (EpochRecord storage) {
        if (epochId >= _epochs[operator].length) revert UnknownEpoch(operator, epochId);
        return _epochs[operator][epochId];
    }

    /// @dev Total of the newest epoch that is not void. Only voided epochs at the end of the operator's own queue are
    /// walked over, so the cost is the operator's alone.
    function _standingTotal(EpochRecord[] storage queue) internal view returns (uint256) {
        for (uint256 i = queue.length; i > 0; i--) {
            if (!queue[i - 1].isVoid) return queue[i - 1].totalCumulative;
        }
        return 0;
    }

    function _epochDigest(Epoch calldata epoch) internal view returns (bytes32) {
        return _hashTypedDataV4(
            keccak256(
                abi.encode(
                    EPOCH_TYPEHASH,
                    epoch.operator,
                    epoch.epochId,
                    epoch.root,
                    epoch.receiptsRoot,
                    epoch.leavesHash,
                    epoch.totalCumulative
                )
            )
        );
    }
}
