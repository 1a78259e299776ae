"""`openlora-node demo`: the whole story on this machine, with nothing mocked.

A payer deposits, three requests for three adapters run in one batch, every receipt is verified, the epoch's root goes on the
chain, everybody claims, and the sum of the claims is compared with what was paid.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.cli.options import ConfigOption, DataDirOption, settings_from

if TYPE_CHECKING:
    from attribution.payer import Payer
    from node.app import Node
    from node.config import Settings

PROMPT = "Fellow citizens, the state of our Union is"
MAX_TOKENS = 32
DEPOSIT_WEI = 10**15
VOUCHER_LIFE_S = 24 * 3600
STATS_TIMEOUT_S = 10.0


def demo(config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Run the whole story: three adapters in one batch, receipts, an epoch root on an EVM, claims.

    Uses a temporary data directory unless --data-dir names one.

    Example: openlora-node demo
    """
    if data_dir is not None:
        asyncio.run(_run(settings_from(config, data_dir, server_port=0)))
        return
    with tempfile.TemporaryDirectory(prefix="openlora-demo-") as directory:
        asyncio.run(_run(settings_from(config, Path(directory), server_port=0)))


async def _run(settings: Settings) -> None:
    from node.opening import open_node
    from node.telemetry.logs import make_logger, passing_on

    quiet = settings.model_copy(update={"telemetry": settings.telemetry.model_copy(update={"log_level": "warning"})})
    started_s = time.monotonic()
    async with AsyncExitStack() as stack:
        stack.enter_context(passing_on(make_logger(quiet.telemetry.log_level, quiet.telemetry.log_format)))
        node = await stack.enter_async_context(open_node(quiet))
        print(node.banner())
        print(f"  ready      in {time.monotonic() - started_s:.1f} s\n")
        payer = await _funded_payer(node)
        answers = await _ask_all(node, payer)
        await _verify_all(node, answers)
        paid_wei = await _settle(node)
        await _claim(node, paid_wei)


async def _funded_payer(node: Node) -> Payer:
    """A fresh key with test tokens in the escrow."""
    from attribution.payer import Payer
    from attribution.voucher import escrow_domain
    from node.settlement.signer import LocalSigner
    from node.settlement.wallet import Wallet

    rails = node.treasury.settled().rails
    if rails.faucet is None:
        raise SystemExit(f'the demo needs a development chain; "{rails.profile.name}" is none')
    wallet = Wallet(rails.chain, LocalSigner(secrets.token_bytes(32)))
    await asyncio.to_thread(rails.faucet.fund_payer, wallet, DEPOSIT_WEI)
    print(f"1. payer {wallet.address} deposits {DEPOSIT_WEI:,} wei of test tokens in the escrow\n")
    domain = escrow_domain(rails.chain.chain_id, rails.contracts.addresses.escrow)
    return Payer(wallet.signer, node.treasury.keys.operator.address, domain)


async def _ask_all(node: Node, payer: Payer) -> list[dict[str, Any]]:
    """One paid request for each adapter, all at once."""
    import aiohttp

    names = [entry.name for entry in node.catalog.entries()]
    print(f"2. {len(names)} requests for {len(names)} adapters, submitted together; the prompt is {PROMPT!r}")
    async with aiohttp.ClientSession(node.url) as session:
        answers = await asyncio.gather(*(_ask(session, node, payer, name) for name in names))
    for name, answer in zip(names, answers, strict=True):
        print(f"   {name:<10} {' '.join(answer['choices'][0]['text'].split())}")
    together = await _adapters_in_one_step(node, sum(answer["usage"]["completion_tokens"] for answer in answers))
    print(f"   one decode step held {together} adapters; kernels: {node.ready.kernels}\n")
    return answers


async def _adapters_in_one_step(node: Node, token_count: int) -> int:
    """The engine's own count, once its statistics (sent twice a second) cover the answers."""
    deadline_s = time.monotonic() + STATS_TIMEOUT_S
    while node.engine.stats.output_tokens_total < token_count and time.monotonic() < deadline_s:
        await asyncio.sleep(0.05)
    return node.engine.stats.max_adapters_in_one_step


async def _ask(session: Any, node: Node, payer: Payer, name: str) -> dict[str, Any]:
    """Sign for the most the answer can cost, ask, and book what it did cost."""
    pricing = node.settings.pricing
    max_fee_wei = len(PROMPT) * pricing.input_token_wei + MAX_TOKENS * pricing.output_token_wei
    headers = {"x-openlora-voucher": payer.header(max_fee_wei, int(time.time()) + VOUCHER_LIFE_S)}
    body = {"model": name, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "repetition_penalty": 1.1}
    async with session.post("/v1/completions", json=body, headers=headers) as response:
        answer: dict[str, Any] = await response.json()
    if response.status != 200:
        raise SystemExit(f"{name}: {response.status} {answer}")
    payer.charge(max_fee_wei, int(answer["openlora"]["receipt"]["receipt"]["feeWei"]))
    return answer


async def _verify_all(node: Node, answers: list[dict[str, Any]]) -> None:
    """Check every receipt as a client would: offline, against the operator's address."""
    from attribution import receipt

    print("3. a receipt for every answer, verified offline against the operator's address")
    manifests = [entry.manifest for entry in node.catalog.entries() if entry.manifest is not None]
    for answer in answers:
        verified = receipt.verify(answer["openlora"]["receipt"], [node.treasury.keys.operator.address], manifests)
        record = verified.record
        tokens = f"{record.tokens.prompt} + {record.tokens.output} tokens"
        print(f"   {answer['model']:<10} {tokens}, fee {int(record.fee_wei):,} wei to {len(record.split)} payees")
    print()


async def _settle(node: Node) -> int:
    """Close the epoch, wait out its challenge delay, and return what it pays."""
    from node.operations import settlement_operations

    rails = node.treasury.settled().rails
    epoch = await settlement_operations(node.treasury)["epochs.close"]()
    if epoch is None or epoch["state"] != "done":
        raise SystemExit(f"the epoch did not reach the chain: {epoch}")
    operator = node.treasury.keys.operator.address
    on_chain = rails.contracts.epoch(operator, epoch["epoch_id"])
    if on_chain is None or "0x" + on_chain.root.hex() != epoch["root"]:
        raise SystemExit("the root on the chain is not the ledger's")
    total_wei = int(epoch["total_wei"])
    print(f"4. epoch {epoch['epoch_id']}: {epoch['records']} records, {total_wei:,} wei collected from the payer's escrow")
    print(f"   root {epoch['root']} on chain {rails.chain.chain_id}")
    delay_s = rails.contracts.challenge_delay_s()
    print(f"   waiting {delay_s} s, in which the guardian may void it\n")
    await asyncio.sleep(max(0.0, on_chain.activates_at_s - time.time()) + 1)
    return total_wei


async def _claim(node: Node, paid_wei: int) -> None:
    """Everybody claims; the balances on the chain are what counts."""
    from node.operations import settlement_operations

    rails = node.treasury.settled().rails
    claims = await settlement_operations(node.treasury)["rewards.claim"](account=None)
    names = _names(node)
    print(f"5. {len(claims)} payees claim")
    total_wei = 0
    for claim in sorted(claims, key=lambda item: -int(item["paid_wei"])):
        balance_wei = rails.contracts.token_balance_wei(claim["account"])
        total_wei += balance_wei
        print(f"   {claim['account']} {balance_wei:>15,} wei  {names.get(claim['account'], 'the node')}")
    is_exact = total_wei == paid_wei
    print(f"   sum {total_wei:,} wei {'==' if is_exact else '!='} {paid_wei:,} wei paid")
    if not is_exact or rails.contracts.token_balance_wei(rails.contracts.addresses.rewards) != 0:
        raise SystemExit("the claims do not add up to what was paid")


def _names(node: Node) -> dict[str, str]:
    """Who is behind an address, from the manifests."""
    names: dict[str, str] = {}
    for entry in node.catalog.entries():
        if entry.manifest is not None:
            names[entry.manifest.trainer.address] = f"trainer of {entry.name}"
            names.update((maker.address, maker.name.partition(" (")[0]) for maker in entry.manifest.contributors)
    return names
