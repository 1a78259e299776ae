// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {IERC1271} from "@openzeppelin/contracts/interfaces/IERC1271.sol";
import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @notice A token that keeps one percent of every transfer once told to.
contract FeeToken is ERC20 {
    bool public isCharging;

    constructor() ERC20("Fee", "FEE") {
        _mint(msg.sender, 1e24);
    }

    function charge() external {
        isCharging = true;
    }

    function _update(address from, address to, uint256 value) internal override {
        bool isTransfer = from != address(0) && to != address(0);
        uint256 fee = isCharging && isTransfer ? value / 100 : 0;
        super._update(from, to, value - fee);
        if (fee != 0) super._update(from, address(0), fee);
    }
}

/// @notice A token that calls back once during the next transfer and remembers how that went.
contract ReentrantToken is ERC20 {
    address private _target;
    bytes private _call;
    bool public wasCalled;
    bool public hasSucceeded;
    bytes public answer;

    constructor() ERC20("Reentrant", "RE") {
        _mint(msg.sender, 1e24);
    }

    function arm(address target, bytes calldata call) external {
        (_target, _call, wasCalled) = (target, call, false);
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (_target == address(0)) return;

        address target = _target;
        _target = address(0);
        wasCalled = true;
        (hasSucceeded, answer) = target.call(_call);
    }
}

/// @notice A contract account that approves one digest until told otherwise.
contract ContractAccount is IERC1271 {
    bytes32 private _approved;

    function approve(bytes32 digest) external {
        _approved = digest;
    }

    function isValidSignature(bytes32 digest, bytes calldata) external view returns (bytes4) {
        return digest == _approved ? IERC1271.isValidSignature.selector : bytes4(0xffffffff);
    }
}

/// @notice Code that a payer's account could be delegated to so that its own signatures fail.
contract Refuser is IERC1271 {
    function isValidSignature(bytes32, bytes calldata) external pure returns (bytes4) {
        return 0xffffffff;
    }
}
