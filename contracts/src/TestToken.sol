// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title TestToken
/// @notice Play money for development chains: its owner mints without limit, so it can hold no value.
contract TestToken is ERC20, Ownable {
    /* CONSTRUCTOR */

    /// @param initialOwner The only account that may mint.
    constructor(address initialOwner) ERC20("OpenLoRA Test Token (no value)", "tOLORA") Ownable(initialOwner) {}

    /* EXTERNAL: OWNER */

    /// @notice Creates `amountWei` test tokens (18 decimals) for `account`.
    function mint(address account, uint256 amountWei) external onlyOwner {
        _mint(account, amountWei);
    }
}
