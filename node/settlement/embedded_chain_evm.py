"""The development chain's state machine: one py-evm chain in memory, one block for each transaction.

Semantics: the same genesis and the same (timestamp, raw transaction) sequence give the same block hashes, always. Nothing here
reads a clock or a random source, which is what makes a replay of the log land on the same head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eth.abc import BlockAPI, BlockHeaderAPI, ReceiptAPI, SignedTransactionAPI
from eth.chains.base import MiningChain
from eth.constants import POST_MERGE_DIFFICULTY, POST_MERGE_MIX_HASH, POST_MERGE_NONCE
from eth.db.atomic import AtomicDB
from eth.exceptions import HeaderNotFound, PyEVMError, TransactionNotFound
from eth.vm.forks.cancun import CancunVM
from eth.vm.spoof import SpoofTransaction
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from node.settlement.genesis import Genesis

BLOCK_GAS_LIMIT = 30_000_000
_NO_ADDRESS = b"\x00" * 20


class SameSecondVM(CancunVM):  # type: ignore[misc]
    """Cancun rules, except that a block may carry its parent's timestamp.

    Why: one transaction is one block. Under the strict rule ten quick transactions would push the chain ten seconds ahead of real
    time, and a challenge delay of five seconds would pass at once.
    """

    @classmethod
    def validate_header(cls, header: BlockHeaderAPI, parent_header: BlockHeaderAPI) -> None:
        """As the parent class, with `timestamp >= parent` in place of `>`."""
        if header.timestamp < parent_header.timestamp:
            raise ValidationError("timestamp is before the parent block's")
        strictly_later = header.copy(timestamp=max(header.timestamp, parent_header.timestamp + 1))
        super().validate_header(strictly_later, parent_header)


class TransactionRefused(Exception):
    """A transaction that cannot enter the next block; `reason` is geth's wording, which every sender already understands."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Located:
    """A mined transaction and where it is."""

    transaction: SignedTransactionAPI
    block: BlockAPI
    index: int
    receipts: tuple[ReceiptAPI, ...]

    @property
    def receipt(self) -> ReceiptAPI:
        """This transaction's own receipt."""
        return self.receipts[self.index]


@dataclass(frozen=True, slots=True)
class CallResult:
    """What a call that changes nothing would do."""

    output: bytes
    is_reverted: bool
    failure: str


class Evm:
    """A chain that mines every accepted transaction at once.

    Args:
        genesis: Chain id, first timestamp and first balances.
    """

    def __init__(self, genesis: Genesis) -> None:
        chain_class: Any = type("DevelopmentChain", (_FixedGasChain,), {"chain_id": genesis.chain_id})
        state = {
            address: {"balance": balance_wei, "nonce": 0, "code": b"", "storage": {}}
            for address, balance_wei in genesis.balances()
        }
        self.chain_id = genesis.chain_id
        self._chain: Any = chain_class.from_genesis(AtomicDB(), _genesis_header(genesis), state)

    @property
    def head(self) -> BlockHeaderAPI:
        """The newest mined header."""
        return self._chain.get_canonical_head()

    @property
    def next_base_fee(self) -> int:
        """What a unit of gas costs at least in the next block, in wei."""
        return int(self._pending_header(0).base_fee_per_gas)

    def pending_block(self, timestamp_s: int) -> BlockAPI:
        """The empty block that would follow the head now."""
        return self._chain.get_vm(at_header=self._pending_header(timestamp_s)).get_block()

    def block_by_number(self, number: int) -> BlockAPI | None:
        """The block at `number`, or None above the head."""
        if number > self.head.block_number:
            return None
        return self._chain.get_canonical_block_by_number(number)

    def block_by_hash(self, block_hash: bytes) -> BlockAPI | None:
        """The block with that hash, or None."""
        try:
            return self._chain.get_block_by_hash(block_hash)
        except HeaderNotFound:
            return None

    def receipts(self, block: BlockAPI) -> tuple[ReceiptAPI, ...]:
        """The receipts of a block, in order."""
        return tuple(block.get_receipts(self._chain.chaindb))

    def find(self, transaction_hash: bytes) -> Located | None:
        """The mined transaction with that hash, or None."""
        try:
            number, index = self._chain.get_canonical_transaction_index(transaction_hash)
        except TransactionNotFound:
            return None
        block = self._chain.get_canonical_block_by_number(number)
        return Located(block.transactions[index], block, index, self.receipts(block))

    def state_at(self, number: int) -> Any:
        """The state after block `number`."""
        return self._chain.get_vm(at_header=self._chain.get_canonical_block_header_by_number(number)).state

    def mine(self, raw: bytes, timestamp_s: int) -> BlockAPI:
        """Put one signed transaction into a block of its own.

        Args:
            raw: The signed transaction as it was sent.
            timestamp_s: The block's time; the head's time is used when it is later.

        Raises:
            TransactionRefused: It is malformed, for another chain, has the wrong nonce, too little money or too little gas.
        """
        transaction = self.decode(raw)
        self._refuse_unminable(transaction)
        self._chain.header = self._pending_header(timestamp_s)
        try:
            self._chain.apply_transaction(transaction)
        except (ValidationError, PyEVMError) as error:
            self._chain.header = self._pending_header(timestamp_s)
            raise TransactionRefused("invalid transaction") from error
        return self._chain.mine_block(coinbase=_NO_ADDRESS, mix_hash=POST_MERGE_MIX_HASH)

    def decode(self, raw: bytes) -> SignedTransactionAPI:
        """Decode a signed transaction and check its signature."""
        try:
            transaction = self._chain.get_vm().get_transaction_builder().decode(raw)
            transaction.check_signature_validity()
        except (RLPException, ValidationError, PyEVMError, ValueError, TypeError, IndexError) as error:
            raise TransactionRefused("rlp: cannot decode the transaction") from error
        return transaction

    def call(self, fields: dict[str, Any], number: int, timestamp_s: int | None) -> CallResult:
        """Run a message without keeping its effects."""
        state = self._free_state(number, timestamp_s)
        computation = state.costless_execute_transaction(self._spoof(fields, state))
        if not computation.is_error:
            return CallResult(bytes(computation.output), False, "")
        is_revert = type(computation.error).__name__ == "Revert"
        return CallResult(bytes(computation.output), True, "execution reverted" if is_revert else "invalid opcode or out of gas")

    def estimate_gas(self, fields: dict[str, Any], timestamp_s: int) -> int:
        """The least gas limit that succeeds, in the pending block."""
        state = self._free_state(self.head.block_number, timestamp_s)
        return int(self._chain.gas_estimator(state, self._spoof(fields, state)))

    def _free_state(self, number: int, timestamp_s: int | None) -> Any:
        """A throw-away state without a base fee: after block `number`, or with a timestamp as the block after the head sees it.

        py-evm's own `in_costless_state` is not used because it reads the wall clock.
        """
        if timestamp_s is None:
            header = self._chain.get_canonical_block_header_by_number(number)
        else:
            header = self._pending_header(timestamp_s)
        vm = self._chain.get_vm(at_header=header)
        return vm.build_state(vm.chaindb.db, header.copy(base_fee_per_gas=0), vm.chain_context, vm.previous_hashes)

    def _spoof(self, fields: dict[str, Any], state: Any) -> SpoofTransaction:
        sender = fields.get("from") or _NO_ADDRESS
        unsigned = (
            self._chain.get_vm()
            .get_transaction_builder()
            .create_unsigned_transaction(
                nonce=state.get_nonce(sender),
                gas_price=0,
                gas=min(fields.get("gas") or BLOCK_GAS_LIMIT, BLOCK_GAS_LIMIT),
                to=fields.get("to") or b"",
                value=fields.get("value") or 0,
                data=fields.get("data") or b"",
            )
        )
        return SpoofTransaction(unsigned, from_=sender)

    def _pending_header(self, timestamp_s: int) -> BlockHeaderAPI:
        head = self.head
        return self._chain.create_header_from_parent(head, timestamp=max(timestamp_s, head.timestamp))

    def _refuse_unminable(self, transaction: SignedTransactionAPI) -> None:
        """The checks a sender must be able to tell apart, before py-evm's own."""
        if getattr(transaction, "chain_id", self.chain_id) not in (None, self.chain_id):
            raise TransactionRefused("invalid chain id for signer")
        if self.find(transaction.hash) is not None:
            raise TransactionRefused("already known")
        state = self.state_at(self.head.block_number)
        nonce = state.get_nonce(transaction.sender)
        if transaction.nonce < nonce:
            raise TransactionRefused(f"nonce too low: next nonce {nonce}, tx nonce {transaction.nonce}")
        if transaction.nonce > nonce:
            raise TransactionRefused(f"nonce too high: next nonce {nonce}, tx nonce {transaction.nonce}")
        if transaction.gas > BLOCK_GAS_LIMIT:
            raise TransactionRefused("exceeds block gas limit")
        base_fee = self.next_base_fee
        if transaction.max_fee_per_gas < base_fee:
            raise TransactionRefused(f"max fee per gas less than block base fee: {base_fee}")
        if transaction.gas < transaction.intrinsic_gas:
            raise TransactionRefused("intrinsic gas too low")
        if state.get_balance(transaction.sender) < transaction.value + transaction.gas * transaction.max_fee_per_gas:
            raise TransactionRefused("insufficient funds for gas * price + value")


class _FixedGasChain(MiningChain):  # type: ignore[misc]
    vm_configuration = ((0, SameSecondVM),)

    def create_header_from_parent(self, parent_header: BlockHeaderAPI, **header_params: Any) -> BlockHeaderAPI:
        return super().create_header_from_parent(parent_header, **{**header_params, "gas_limit": parent_header.gas_limit})


def _genesis_header(genesis: Genesis) -> dict[str, Any]:
    return {
        "coinbase": _NO_ADDRESS,
        "difficulty": POST_MERGE_DIFFICULTY,
        "extra_data": b"openlora development",
        "gas_limit": BLOCK_GAS_LIMIT,
        "mix_hash": POST_MERGE_MIX_HASH,
        "nonce": POST_MERGE_NONCE,
        "timestamp": genesis.timestamp_s,
    }
