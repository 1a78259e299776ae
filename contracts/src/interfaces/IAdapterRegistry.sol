// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

/// @title Adapter registry
/// @notice Says who trained an adapter, on which base model, and which manifest speaks for it.
/// @dev An adapter's key is the hash of its content. The first registration wins and needs the trainer's own consent.
/// Warning: a hash proves content, not authorship: whoever sees an unregistered adapter can register it first.
interface IAdapterRegistry {
    /* TYPES */

    /// @notice Life of an adapter: `Active` may become `Deprecated` or `Revoked`, `Deprecated` may become `Revoked`.
    enum Status {
        Unknown,
        Active,
        Deprecated,
        Revoked
    }

    /// @notice What is stored of an adapter.
    /// @param manifestHash Hash of the manifest of the newest version.
    /// @param baseId Content hash of the base model that the adapter was trained on.
    /// @param trainer The only account that may publish versions and deprecate.
    /// @param version Number of manifests published so far; 1 after registration, 0 when unknown.
    /// @param registeredAt Block time of the registration, in seconds.
    /// @param status See `Status`.
    struct Adapter {
        bytes32 manifestHash;
        bytes32 baseId;
        address trainer;
        uint32 version;
        uint56 registeredAt;
        Status status;
    }

    /* ERRORS */

    /// @dev Thrown when a hash that must name something is zero.
    error ZeroHash();

    /// @dev Thrown when the trainer is the zero address.
    error ZeroTrainer();

    /// @dev Thrown when `adapterId` belongs to `trainer` already.
    error AlreadyRegistered(bytes32 adapterId, address trainer);

    /// @dev Thrown when neither the caller nor the signature is `trainer`.
    error InvalidTrainerSignature(address trainer);

    /// @dev Thrown when `caller` is not the adapter's trainer.
    error NotTrainer(bytes32 adapterId, address trainer, address caller);

    /// @dev Thrown when the adapter's status does not allow the call.
    error WrongStatus(bytes32 adapterId, Status status);

    /* EVENTS */

    /// @notice An adapter was registered, or its trainer published another manifest (`version` above 1).
    event ManifestPublished(
        bytes32 indexed adapterId,
        address indexed trainer,
        bytes32 indexed baseId,
        uint32 version,
        bytes32 manifestHash,
        string uri
    );

    /// @notice The trainer asks that the adapter no longer be used for new work.
    event AdapterDeprecated(bytes32 indexed adapterId);

    /// @notice The guardian withdrew the adapter: licence, malware.
    event AdapterRevoked(bytes32 indexed adapterId);

    /* FUNCTIONS */

    /// @notice Registers `adapterId` for `trainer`, for good.
    /// @dev Anyone may send it. Unless the sender is the trainer, `trainerSignature` must be the trainer's EIP-712
    /// signature of `Adapter(bytes32 adapterId,bytes32 manifestHash,bytes32 baseId,address trainer,string uri)`.
    function register(
        bytes32 adapterId,
        bytes32 manifestHash,
        bytes32 baseId,
        address trainer,
        string calldata uri,
        bytes calldata trainerSignature
    ) external;

    /// @notice Publishes the next version of the manifest of an active adapter; trainer only.
    /// @dev The content, its base and its trainer never change: other content is another adapter.
    function publishManifest(bytes32 adapterId, bytes32 manifestHash, string calldata uri) external;

    /// @notice Marks an active adapter as deprecated; trainer only; cannot be undone.
    function deprecate(bytes32 adapterId) external;

    /// @notice Marks an active or deprecated adapter as revoked; guardian only; cannot be undone.
    /// @dev Touches no money: rewards already earned stay claimable.
    function revoke(bytes32 adapterId) external;

    /// @notice What is stored under `adapterId`; all zero when unknown.
    function adapterOf(bytes32 adapterId) external view returns (Adapter memory);
}
