// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {Hashes} from "@openzeppelin/contracts/utils/cryptography/Hashes.sol";

/// @notice The tree of `IAttributionRewards`, written a second time: leaves in order, sorted pairs, odd last node up.
library MerkleTree {
    function root(bytes32[] memory leaves) internal pure returns (bytes32) {
        while (leaves.length > 1) leaves = _parents(leaves);
        return leaves[0];
    }

    function proof(bytes32[] memory leaves, uint256 index) internal pure returns (bytes32[] memory path) {
        path = new bytes32[](0);
        while (leaves.length > 1) {
            if (index ^ 1 < leaves.length) path = _append(path, leaves[index ^ 1]);
            leaves = _parents(leaves);
            index /= 2;
        }
    }

    function _parents(bytes32[] memory level) private pure returns (bytes32[] memory above) {
        above = new bytes32[]((level.length + 1) / 2);
        for (uint256 i = 0; i < above.length; i++) {
            bool isOddLast = 2 * i + 1 == level.length;
            above[i] = isOddLast ? level[2 * i] : Hashes.commutativeKeccak256(level[2 * i], level[2 * i + 1]);
        }
    }

    function _append(bytes32[] memory path, bytes32 node) private pure returns (bytes32[] memory longer) {
        longer = new bytes32[](path.length + 1);
        for (uint256 i = 0; i < path.length; i++) {
            longer[i] = path[i];
        }
        longer[path.length] = node;
    }
}
