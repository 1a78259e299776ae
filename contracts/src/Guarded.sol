// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {IGuarded} from "./interfaces/IGuarded.sol";
import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";

/// @title Guarded
/// @notice The two-step guardian shared by the registry and the rewards.
abstract contract Guarded is IGuarded, Ownable2Step {
    /* CONSTRUCTOR */

    /// @param initialGuardian The first guardian; the zero address is refused by `Ownable`.
    constructor(address initialGuardian) Ownable(initialGuardian) {}

    /* EXTERNAL: GUARDIAN */

    /// @notice Always reverts: see `GuardianRequired`.
    function renounceOwnership() public view override onlyOwner {
        revert GuardianRequired();
    }

    /* EXTERNAL: VIEWS */

    /// @inheritdoc IGuarded
    function guardian() external view returns (address) {
        return owner();
    }
}
