// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

import {AdapterRegistry} from "../src/AdapterRegistry.sol";
import {AttributionRewards} from "../src/AttributionRewards.sol";
import {TestToken} from "../src/TestToken.sol";
import {UsageEscrow} from "../src/UsageEscrow.sol";
import {Base} from "./Base.sol";
import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";

/// @notice What the node ships is what is tested here.
contract ArtifactsTest is Base {
    function test_artifacts_bytecode_isWhatTheseTestsRun() public view {
        _check("AdapterRegistry", type(AdapterRegistry).creationCode);
        _check("AttributionRewards", type(AttributionRewards).creationCode);
        _check("TestToken", type(TestToken).creationCode);
        _check("UsageEscrow", type(UsageEscrow).creationCode);
    }

    function test_testToken_mint_ownerOnly() public {
        vm.assertEq(token.decimals(), 18, "decimals");

        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, OTHER));
        vm.prank(OTHER);
        token.mint(OTHER, 1);
    }

    function _check(string memory name, bytes memory creationCode) internal view {
        string memory artifact = vm.readFile(string.concat("../node/settlement/abi/", name, ".json"));
        vm.assertEq(vm.parseJsonBytes(artifact, ".bytecode"), creationCode, name);
    }
}
