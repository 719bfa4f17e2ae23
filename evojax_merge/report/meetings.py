"""The proof of a judged search: how often judges preferred the winner's held-out answers to another model's."""

from dataclasses import dataclass

# With fewer votes than these nothing is claimed, and no interval is shown.
FEWEST = 10
TOO_FEW_VOTES = "too few votes to say"


@dataclass(frozen=True)
class Meetings:
    """Votes on the answers of the winner and of another model to held-out prompts. won, lost: the votes for the winner,
    and for the other; neither: ties and both bad; same: prompts with equal answers, on which nobody votes."""

    won: int
    lost: int
    neither: int
    same: int

    @property
    def votes(self) -> int:
        return self.won + self.lost + self.neither

    @property
    def too_few(self) -> bool:
        return self.votes < FEWEST

    def share(self) -> str:
        """The winner's share of the votes for one of the two, with its exact 95% interval (Clopper and Pearson)."""
        if self.too_few:
            return TOO_FEW_VOTES
        if not self.won + self.lost:
            return "no vote for either"
        # SciPy takes long to import, and a search needs it at its end.
        from scipy.special import betaincinv

        low = betaincinv(self.won, self.lost + 1, 0.025) if self.won else 0.0
        high = betaincinv(self.won + 1, self.lost, 0.975) if self.lost else 1.0
        noise = ", within noise" if low <= 0.5 <= high else ""
        return f"{self.won / (self.won + self.lost):.0%}, 95% interval {low:.0%} to {high:.0%}{noise}"

    def sentence(self, name: str) -> str:
        """The votes against the model of a name, and what they say."""
        same = f" (to {self.same} more prompts both give the same answer)" if self.same else ""
        of = f"Judges preferred the winner to {name} in {self.won} of {self.votes} held-out meetings"
        if self.too_few:
            return f"{of}{same}: {TOO_FEW_VOTES}."
        return f"{of}, {name} in {self.lost}, and neither in {self.neither}{same}; its share: {self.share()}."
