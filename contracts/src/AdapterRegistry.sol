// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {Guarded} from "./Guarded.sol";
import {Signatures} from "./Signatures.sol";
import {IAdapterRegistry} from "./interfaces/IAdapterRegistry.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";

/// @title AdapterRegistry
/// @notice See `IAdapterRegistry`.
contract AdapterRegistry is IAdapterRegistry, Guarded, EIP712 {
    /* CONSTANTS */

    bytes32 public constant ADAPTER_TYPEHASH =
        keccak256("Adapter(bytes32 adapterId,bytes32 manifestHash,bytes32 baseId,address trainer,string uri)");

    /* STORAGE */

    mapping(bytes32 adapterId => Adapter) private _adapters;

    /* CONSTRUCTOR */

    /// @param initialGuardian Who may revoke adapters.
    constructor(address initialGuardian) Guarded(initialGuardian) EIP712("OpenLoRA AdapterRegistry", "1") {}

    /* MODIFIERS */

    modifier onlyTrainer(bytes32 adapterId) {
        address trainer = _adapters[adapterId].trainer;
        if (msg.sender != trainer) revert NotTrainer(adapterId, trainer, msg.sender);
        _;
    }

    /* EXTERNAL: ANYONE */

    /// @inheritdoc IAdapterRegistry
    function register(
        bytes32 adapterId,
        bytes32 manifestHash,
        bytes32 baseId,
        address trainer,
        string calldata uri,
        bytes calldata trainerSignature
    ) external {
        if (adapterId == 0 || manifestHash == 0 || baseId == 0) revert ZeroHash();
        if (trainer == address(0)) revert ZeroTrainer();
        address registered = _adapters[adapterId].trainer;
        if (registered != address(0)) revert AlreadyRegistered(adapterId, registered);
        if (msg.sender != trainer) {
            bytes32 digest = _registrationDigest(adapterId, manifestHash, baseId, trainer, uri);
            if (!Signatures.isValid(trainer, digest, trainerSignature)) revert InvalidTrainerSignature(trainer);
        }

        // The cast is safe: 56 bits of seconds last for two billion years.
        _adapters[adapterId] = Adapter(manifestHash, baseId, trainer, 1, uint56(block.timestamp), Status.Active);

        emit ManifestPublished(adapterId, trainer, baseId, 1, manifestHash, uri);
    }

    /* EXTERNAL: TRAINER */

    /// @inheritdoc IAdapterRegistry
    function publishManifest(bytes32 adapterId, bytes32 manifestHash, string calldata uri)
        external
        onlyTrainer(adapterId)
    {
        Adapter storage adapter = _adapters[adapterId];
        if (manifestHash == 0) revert ZeroHash();
        if (adapter.status != Status.Active) revert WrongStatus(adapterId, adapter.status);

        adapter.manifestHash = manifestHash;
        adapter.version += 1;

        emit ManifestPublished(adapterId, msg.sender, adapter.baseId, adapter.version, manifestHash, uri);
    }

    /// @inheritdoc IAdapterRegistry
    function deprecate(bytes32 adapterId) external onlyTrainer(adapterId) {
        Adapter storage adapter = _adapters[adapterId];
        if (adapter.status != Status.Active) revert WrongStatus(adapterId, adapter.status);

        adapter.status = Status.Deprecated;

        emit AdapterDeprecated(adapterId);
    }

    /* EXTERNAL: GUARDIAN */

    /// @inheritdoc IAdapterRegistry
    function revoke(bytes32 adapterId) external onlyOwner {
        Adapter storage adapter = _adapters[adapterId];
        bool isStanding = adapter.status == Status.Active || adapter.status == Status.Deprecated;
        if (!isStanding) revert WrongStatus(adapterId, adapter.status);

        adapter.status = Status.Revoked;

        emit AdapterRevoked(adapterId);
    }

    /* EXTERNAL: VIEWS */

    /// @inheritdoc IAdapterRegistry
    function adapterOf(bytes32 adapterId) external view returns (Adapter memory) {
        return _adapters[adapterId];
    }

    /* INTERNAL */

    function _registrationDigest(
        bytes32 adapterId,
        bytes32 manifestHash,
        bytes32 baseId,
        address trainer,
        string calldata uri
    ) internal view returns (bytes32) {
        bytes32 uriHash = keccak256(bytes(uri));
        return
            _hashTypedDataV4(keccak256(abi.encode(ADAPTER_TYPEHASH, adapterId, manifestHash, baseId, trainer, uriHash)));
    }
}
