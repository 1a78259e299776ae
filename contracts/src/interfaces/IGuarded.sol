// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

/// @title A contract with one guardian
/// @notice The guardian stops wrong things; it never moves money.
/// @dev The guardian is OpenZeppelin's two-step owner: `transferOwnership` names a successor, who must `acceptOwnership`.
interface IGuarded {
    /// @dev Thrown when the guardian tries to leave without a successor: nobody could stop a wrong root afterwards.
    error GuardianRequired();

    /// @notice The account that may stop things now.
    function guardian() external view returns (address);
}
