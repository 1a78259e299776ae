// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {IERC20, SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";

/// @title ExactTransfer
/// @notice Token transfers that arrive in full or revert: tokens that keep a fee would leave the books short.
library ExactTransfer {
    using SafeERC20 for IERC20;

    /// @dev Thrown when `received` tokens arrived where `expected` were sent.
    error InexactTransfer(uint256 expected, uint256 received);

    /// @dev Moves `amount` from `from`, who approved this contract, to this contract.
    function pull(IERC20 token, address from, uint256 amount) internal {
        uint256 balanceBefore = token.balanceOf(address(this));
        token.safeTransferFrom(from, address(this), amount);
        _requireArrived(token, address(this), balanceBefore, amount);
    }

    /// @dev Moves `amount` from this contract to `to`.
    function push(IERC20 token, address to, uint256 amount) internal {
        uint256 balanceBefore = token.balanceOf(to);
        token.safeTransfer(to, amount);
        _requireArrived(token, to, balanceBefore, amount);
    }

    /// @dev A balance below `balanceBefore` underflows and reverts, which is what it deserves.
    function _requireArrived(IERC20 token, address holder, uint256 balanceBefore, uint256 amount) private view {
        uint256 received = token.balanceOf(holder) - balanceBefore;
        if (received != amount) revert InexactTransfer(amount, received);
    }
}
