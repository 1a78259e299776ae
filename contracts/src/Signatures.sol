// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {SignatureChecker} from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";

/// @title Signatures
/// @notice Says whether `signer` signed a digest, by key or as a contract (ERC-1271).
library Signatures {
    /// @dev The key is tried first, whatever code the signer has. `SignatureChecker.isValidSignatureNow` asks the code
    /// first, so a payer could sign as a key, be served, then delegate its account (EIP-7702) to code that says no.
    /// Warning: a contract signer can still change its answer at any time; whoever gives it credit carries that risk.
    function isValid(address signer, bytes32 digest, bytes memory signature) internal view returns (bool) {
        (address recovered, ECDSA.RecoverError failure,) = ECDSA.tryRecover(digest, signature);
        if (failure == ECDSA.RecoverError.NoError && recovered == signer) return true;

        return signer.code.length != 0 && SignatureChecker.isValidERC1271SignatureNow(signer, digest, signature);
    }
}
