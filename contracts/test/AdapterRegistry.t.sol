// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AdapterRegistry} from "../src/AdapterRegistry.sol";
import {IAdapterRegistry} from "../src/interfaces/IAdapterRegistry.sol";
import {Base} from "./Base.sol";
import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";

contract AdapterRegistryTest is Base {
    bytes32 private constant ADAPTER = keccak256("adapter");
    bytes32 private constant MANIFEST = keccak256("manifest");
    bytes32 private constant BASE_MODEL = keccak256("base model");
    string private constant URI = "https://example.org/manifest.json";

    address private immutable TRAINER = vm.addr(0x7EA);
    AdapterRegistry private registry;

    function setUp() public override {
        vm.warp(1_800_000_000);
        registry = new AdapterRegistry(GUARDIAN);
    }

    /* REGISTER */

    function test_register_byTrainer_needsNoSignature() public {
        vm.prank(TRAINER);
        vm.expectEmit(address(registry));
        emit IAdapterRegistry.ManifestPublished(ADAPTER, TRAINER, BASE_MODEL, 1, MANIFEST, URI);
        registry.register(ADAPTER, MANIFEST, BASE_MODEL, TRAINER, URI, "");

        IAdapterRegistry.Adapter memory expected = IAdapterRegistry.Adapter(
            MANIFEST, BASE_MODEL, TRAINER, 1, uint56(block.timestamp), IAdapterRegistry.Status.Active
        );
        vm.assertEq(abi.encode(registry.adapterOf(ADAPTER)), abi.encode(expected), "adapter");
    }

    function test_register_byAnyoneWithSignature_belongsToTrainer() public {
        _registerSigned();

        vm.assertEq(registry.adapterOf(ADAPTER).trainer, TRAINER, "trainer");
    }

    function testFuzz_register_changedFields_reverts(uint8 field, bytes32 change) public {
        vm.assume(change != 0 && change != ADAPTER && change != MANIFEST && change != BASE_MODEL);
        (bytes32 adapterId, bytes32 manifestHash, bytes32 baseId, string memory uri) =
            (ADAPTER, MANIFEST, BASE_MODEL, URI);
        address trainer = TRAINER;
        bytes memory signature = _signature(0x7EA);
        if (field % 6 == 0) adapterId = change;
        if (field % 6 == 1) manifestHash = change;
        if (field % 6 == 2) baseId = change;
        if (field % 6 == 3) trainer = OTHER;
        if (field % 6 == 4) uri = string(abi.encode(change));
        if (field % 6 == 5) signature = _signature(OTHER_KEY);

        vm.expectRevert(abi.encodeWithSelector(IAdapterRegistry.InvalidTrainerSignature.selector, trainer));
        registry.register(adapterId, manifestHash, baseId, trainer, uri, signature);
    }

    function test_register_signedForAnotherChain_reverts() public {
        bytes memory signature = _signature(0x7EA);
        vm.chainId(block.chainid + 1);

        vm.expectRevert(abi.encodeWithSelector(IAdapterRegistry.InvalidTrainerSignature.selector, TRAINER));
        registry.register(ADAPTER, MANIFEST, BASE_MODEL, TRAINER, URI, signature);
    }

    function test_register_again_firstWinsEvenAfterRevocation() public {
        _registerSigned();
        vm.prank(GUARDIAN);
        registry.revoke(ADAPTER);

        vm.expectRevert(abi.encodeWithSelector(IAdapterRegistry.AlreadyRegistered.selector, ADAPTER, TRAINER));
        vm.prank(OTHER);
        registry.register(ADAPTER, MANIFEST, BASE_MODEL, OTHER, URI, "");
    }

    function test_register_zeroValues_reverts() public {
        vm.expectRevert(IAdapterRegistry.ZeroHash.selector);
        registry.register(0, MANIFEST, BASE_MODEL, TRAINER, URI, "");
        vm.expectRevert(IAdapterRegistry.ZeroHash.selector);
        registry.register(ADAPTER, 0, BASE_MODEL, TRAINER, URI, "");
        vm.expectRevert(IAdapterRegistry.ZeroHash.selector);
        registry.register(ADAPTER, MANIFEST, 0, TRAINER, URI, "");
        vm.expectRevert(IAdapterRegistry.ZeroTrainer.selector);
        registry.register(ADAPTER, MANIFEST, BASE_MODEL, address(0), URI, "");
    }

    /* TRAINER */

    function test_publishManifest_byTrainer_countsVersions() public {
        _registerSigned();
        bytes32 next = keccak256("next manifest");

        vm.prank(TRAINER);
        vm.expectEmit(address(registry));
        emit IAdapterRegistry.ManifestPublished(ADAPTER, TRAINER, BASE_MODEL, 2, next, "ipfs://next");
        registry.publishManifest(ADAPTER, next, "ipfs://next");

        vm.assertEq(registry.adapterOf(ADAPTER).version, 2, "version");
        vm.assertEq(registry.adapterOf(ADAPTER).manifestHash, next, "manifest");
    }

    function testFuzz_trainerCalls_byStranger_reverts(address stranger) public {
        vm.assume(stranger != TRAINER);
        _registerSigned();
        bytes memory expected = abi.encodeWithSelector(IAdapterRegistry.NotTrainer.selector, ADAPTER, TRAINER, stranger);

        vm.prank(stranger);
        vm.expectRevert(expected);
        registry.publishManifest(ADAPTER, MANIFEST, URI);
        vm.prank(stranger);
        vm.expectRevert(expected);
        registry.deprecate(ADAPTER);
    }

    function test_publishManifest_zeroHashOrDeprecated_reverts() public {
        _registerSigned();
        vm.prank(TRAINER);
        vm.expectRevert(IAdapterRegistry.ZeroHash.selector);
        registry.publishManifest(ADAPTER, 0, URI);

        vm.prank(TRAINER);
        registry.deprecate(ADAPTER);

        bytes memory expected =
            abi.encodeWithSelector(IAdapterRegistry.WrongStatus.selector, ADAPTER, IAdapterRegistry.Status.Deprecated);
        vm.prank(TRAINER);
        vm.expectRevert(expected);
        registry.publishManifest(ADAPTER, MANIFEST, URI);
        vm.prank(TRAINER);
        vm.expectRevert(expected);
        registry.deprecate(ADAPTER);
    }

    /* GUARDIAN */

    function test_revoke_activeOrDeprecated_revokesForGood() public {
        _registerSigned();
        vm.prank(TRAINER);
        registry.deprecate(ADAPTER);

        vm.prank(GUARDIAN);
        registry.revoke(ADAPTER);

        vm.assertTrue(registry.adapterOf(ADAPTER).status == IAdapterRegistry.Status.Revoked, "status");
        vm.prank(GUARDIAN);
        vm.expectRevert(
            abi.encodeWithSelector(IAdapterRegistry.WrongStatus.selector, ADAPTER, IAdapterRegistry.Status.Revoked)
        );
        registry.revoke(ADAPTER);
    }

    function test_revoke_unknownAdapter_reverts() public {
        vm.prank(GUARDIAN);
        vm.expectRevert(
            abi.encodeWithSelector(IAdapterRegistry.WrongStatus.selector, ADAPTER, IAdapterRegistry.Status.Unknown)
        );
        registry.revoke(ADAPTER);
    }

    function testFuzz_revoke_notGuardian_reverts(address caller) public {
        vm.assume(caller != GUARDIAN);
        _registerSigned();

        vm.prank(caller);
        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, caller));
        registry.revoke(ADAPTER);
    }

    /* INTERNAL */

    function _registerSigned() internal {
        registry.register(ADAPTER, MANIFEST, BASE_MODEL, TRAINER, URI, _signature(0x7EA));
    }

    function _signature(uint256 key) internal view returns (bytes memory) {
        bytes32 typeHash =
            keccak256("Adapter(bytes32 adapterId,bytes32 manifestHash,bytes32 baseId,address trainer,string uri)");
        bytes32 structHash =
            keccak256(abi.encode(typeHash, ADAPTER, MANIFEST, BASE_MODEL, TRAINER, keccak256(bytes(URI))));
        return _sign(key, "OpenLoRA AdapterRegistry", address(registry), structHash);
    }
}
