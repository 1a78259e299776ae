"""A whole node, started as an operator starts it, for the tests that use it from outside."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attribution.payer import Payer
from attribution.voucher import escrow_domain
from node.resources import data_path
from node.settlement.chain import Chain
from node.settlement.chain_profiles import PROFILES
from node.settlement.deploy import DEPLOYMENT_NAME, load_deployment
from node.settlement.faucet import Faucet
from node.settlement.keys import KeyDirectory
from node.settlement.rails import FUNDER
from node.settlement.settlement_contracts import SettlementContracts
from node.settlement.signer import LocalSigner
from node.settlement.wallet import Wallet

ROOT = Path(__file__).parents[2]
COMMAND = [str(Path(sys.executable).parent / "openlora-node")]
START_TIMEOUT_S = 240.0
POLL_S = 0.1


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def bundle(self) -> dict[str, Any]:
        """The receipt inside the answer."""
        return self.body["openlora"]["receipt"]

    @property
    def fee_wei(self) -> int:
        return int(self.bundle["receipt"]["feeWei"])


class EventSource:
    """The events of one streamed answer, read one at a time; leaving the block hangs up."""

    def __init__(self, url: str, path: str, body: Any, headers: Mapping[str, str]) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=120)
        self._connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **headers})
        self._response = self._connection.getresponse()
        self.status, self.headers = self._response.status, dict(self._response.headers)

    def __iter__(self) -> Iterator[Any]:
        while line := self._response.readline():
            text = line.decode().strip()
            if text.startswith("data:") and text != "data: [DONE]":
                yield json.loads(text.removeprefix("data:"))

    def __enter__(self) -> EventSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()


@dataclass
class RunningNode:
    """A started node: its process, its address and where it keeps its data."""

    process: subprocess.Popen[str]
    url: str
    data_dir: Path
    banner: str
    env: dict[str, str]

    @property
    def operator(self) -> str:
        """The address that signs its receipts, as the banner shows it."""
        return self._of_banner(r"operator +(0x[0-9a-fA-F]{40})")

    @property
    def rpc_url(self) -> str:
        """The chain's endpoint, as the banner shows it."""
        return self._of_banner(r"chain +.*(http://\S+)")

    @property
    def log(self) -> str:
        """Everything it wrote to standard error."""
        return (self.data_dir / "stderr.log").read_text()

    def _of_banner(self, pattern: str) -> str:
        found = re.search(pattern, self.banner)
        assert found, self.banner
        return found[1]

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, None, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.call("POST", path, body, **headers)

    def call(self, method: str, path: str, body: Any, **headers: str) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **headers}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return _answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return _answer(error.code, error.headers, error.read())

    def stream(self, path: str, body: Any, **headers: str) -> EventSource:
        """Ask for a streamed answer."""
        return EventSource(self.url, path, body, headers)

    def receipt(self, request_id: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """The receipt of a request whose books may still be closing."""
        return wait_for(lambda: self._receipt_now(request_id), f"receipt {request_id}", timeout_s)

    def _receipt_now(self, request_id: str) -> dict[str, Any] | None:
        answer = self.get(f"/v1/receipts/{request_id}")
        return answer.body if answer.status == 200 else None

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command against this node's data directory."""
        return run_cli(*arguments, "--data-dir", str(self.data_dir), check=check, env=self.env)

    def children(self) -> dict[int, str]:
        """Process id and command line of its child processes."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {int(pid): Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids}

    def child(self, module: str) -> int:
        """The process id of the child that runs `module`."""
        return next(pid for pid, command in self.children().items() if module in command)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 90.0) -> int:
        """Signal the node and wait for its end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End the node and every process it started, at once and without a last word."""
        pids = [self.process.pid, *self.children()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        wait_for(lambda: not any(_is_running(pid) for pid in pids), "the end of the children", 30)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _answer(status: int, headers: Any, raw: bytes) -> Answer:
    text = raw.decode()
    lowered = {name.lower(): value for name, value in headers.items()}
    return Answer(status, lowered, json.loads(text) if text.startswith(("{", "[")) else text)


def wait_for(look: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """Poll until `look` returns something true, and return that."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, f"{what} did not come within {timeout_s:g} s"
        time.sleep(POLL_S)
    return found


def run_cli(*arguments: str, check: bool = True, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `openlora-node` to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=280, check=False, env=env or environment()
    )
    assert not check or done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment(**extra: str) -> dict[str, str]:
    """A plain environment: no setting of the caller's, no colours, nothing fetched."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPENLORA_")}
    return {**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "NO_COLOR": "1", "COLUMNS": "200", **extra}


def start_node(
    data_dir: Path, *options: str, env: dict[str, str] | None = None, cwd: Path | None = None, program: str = COMMAND[0]
) -> RunningNode:
    """Start a node on a free port and wait for its banner."""
    command = [program, "start", "--port", "0", "--data-dir", str(data_dir), *options]
    env = env or environment()
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "stderr.log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=cwd)
    assert process.stdout is not None
    banner, deadline_s = "", time.monotonic() + START_TIMEOUT_S
    while "operator" not in banner:
        line = process.stdout.readline()
        if not line or time.monotonic() > deadline_s:
            process.kill()
            process.wait()
            raise AssertionError(f"no banner; stderr ends with:\n{(data_dir / 'stderr.log').read_text()[-4000:]}")
        banner += line
    url = re.search(r"http://[\d.]+:\d+", banner)
    assert url, banner
    return RunningNode(process, url[0], data_dir, banner, env)


@dataclass
class Customer:
    """Somebody with a deposit in the escrow who signs a voucher for every request."""

    signer: LocalSigner
    terms: Mapping[str, Any]
    payer: Payer

    @property
    def input_wei(self) -> int:
        return int(self.terms["input_token_wei"])

    @property
    def output_wei(self) -> int:
        return int(self.terms["output_token_wei"])

    def another_payer(self, signer: Any = None, operator: str | None = None, used_wei: int = 0) -> Payer:
        """A payer with a memory of its own: by default the same key for the same operator."""
        domain = escrow_domain(self.terms["chain_id"], self.terms["escrow"])
        return Payer(signer or self.signer, operator or self.terms["operator"], domain, used_wei)

    def voucher(self, max_fee_wei: int, lifetime_s: int = 24 * 3600) -> dict[str, str]:
        """The header for one request of at most `max_fee_wei`."""
        return {"x-openlora-voucher": self.payer.header(max_fee_wei, int(time.time()) + lifetime_s)}

    def max_fee_wei(self, prompt: str, max_tokens: int) -> int:
        """What an answer can cost at most: a token has at least one character."""
        return len(prompt) * self.input_wei + max_tokens * self.output_wei

    def ask(self, node: RunningNode, model: str, prompt: str, max_tokens: int, header: Mapping[str, str] | None = None) -> Answer:
        """One paid, greedy completion, with a voucher signed now or before; what it cost is booked."""
        max_fee_wei = self.max_fee_wei(prompt, max_tokens)
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = node.post("/v1/completions", body, **(header or self.voucher(max_fee_wei)))
        assert answer.status == 200, answer.body
        self.payer.charge(max_fee_wei, answer.fee_wei)
        return answer


def contracts_of(node: RunningNode) -> SettlementContracts:
    """The contracts of a node's embedded chain, asked from outside."""
    chain = Chain(node.rpc_url, PROFILES["embedded"].chain_id, 30.0)
    chain.connect()
    return SettlementContracts(chain, load_deployment(node.data_dir / "chain" / DEPLOYMENT_NAME, chain).addresses)


def new_customer(node: RunningNode, deposit_wei: int) -> Customer:
    """A fresh key with gas money and a deposit, from the development chain's funder."""
    contracts = contracts_of(node)
    funder = Wallet(contracts.chain, KeyDirectory(node.data_dir / "keys").load(FUNDER))
    signer = LocalSigner(secrets.token_bytes(32))
    faucet = Faucet(PROFILES["embedded"], contracts, funder)
    faucet.fund_payer(Wallet(contracts.chain, signer), deposit_wei)
    terms = node.get("/info").body["openlora"]["payment"]
    payer = Payer(signer, terms["operator"], escrow_domain(terms["chain_id"], terms["escrow"]))
    return Customer(signer, terms, payer)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What tests need beyond the shared node."""
    return SimpleNamespace(
        command=COMMAND,
        contracts_of=contracts_of,
        demo_adapters=data_path("config/demo/adapters"),
        environment=environment,
        new_customer=new_customer,
        run_cli=run_cli,
        start_node=start_node,
        wait_for=wait_for,
    )


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """One node for every test that does not break it."""
    running = start_node(tmp_path_factory.mktemp("node"))
    try:
        yield running
        assert running.stop() == 0
    finally:
        if running.process.poll() is None:
            running.kill()
