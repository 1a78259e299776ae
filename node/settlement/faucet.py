"""Money for development chains: gas and test tokens out of nothing. Refuses any chain that is not one."""

from __future__ import annotations

from node.errors import ChainError
from node.settlement.chain import Call
from node.settlement.chain_profiles import ChainProfile
from node.settlement.settlement_contracts import SettlementContracts
from node.settlement.wallet import Wallet

PAYER_GAS_MONEY_WEI = 10**18


class Faucet:
    """Gives from the funder, who has gas money from the genesis and owns the test token.

    Args:
        profile: Must be a development chain.
        contracts: Deployed by the funder.
        funder: Its wallet.

    Raises:
        ChainError: The profile is a chain where money is real.
    """

    def __init__(self, profile: ChainProfile, contracts: SettlementContracts, funder: Wallet) -> None:
        if not profile.is_development:
            raise ChainError(f'there is no free money on "{profile.name}"; use a development profile', code="transaction_failed")
        self._contracts, self._funder = contracts, funder

    def give_gas(self, account: str, amount_wei: int = PAYER_GAS_MONEY_WEI) -> None:
        """Send gas money."""
        self._funder.send(Call(account, b"", amount_wei), "give gas money")

    def give_tokens(self, account: str, amount_wei: int) -> None:
        """Mint test tokens."""
        self._funder.send(self._contracts.mint(account, amount_wei), "mint test tokens")

    def fund_payer(self, payer: Wallet, deposit_wei: int) -> None:
        """Give a payer gas and tokens, and have it deposit the tokens with its own key."""
        self.give_gas(payer.address)
        self.give_tokens(payer.address, deposit_wei)
        deposit(self._contracts, payer, deposit_wei)


def deposit(contracts: SettlementContracts, payer: Wallet, amount_wei: int) -> None:
    """Approve and deposit a payer's own tokens: two transactions, one when the approval is there already."""
    if contracts.token_allowance_wei(payer.address, contracts.addresses.escrow) < amount_wei:
        payer.send(contracts.approve(contracts.addresses.escrow, amount_wei), "approve the deposit")
    payer.send(contracts.deposit(payer.address, amount_wei), "deposit")
