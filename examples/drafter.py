"""A drafter of one's own: proposes what followed when the last word stood in the text before."""

from redrafter_mlx import load, stream_generate
from redrafter_mlx.drafters.protocol import Unheeding, Written
from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.tree import TokenTree


class LastTime(Unheeding):
    """Needs no weights, and keeps nothing between rounds: the text comes with the context."""

    needs_no_search = True

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        tokens = context.transcript.tokens
        *before, last = tokens
        if last not in before:
            return TokenTree.root(last)
        place = len(before) - before[::-1].index(last)
        follow = tokens[place : place + budget.length]
        chances = [0.5] * len(follow)
        return budget.tree(Written(follow, chances, chances).candidates(last))


model, tokenizer = load("demo")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Say this three times: the tide is the moon's work."}],
    add_generation_prompt=True,
)
for event in stream_generate(model, tokenizer, prompt, drafter=LastTime(), max_tokens=60):
    print(event.text, end="", flush=event.end_of_round)
print(f"\n{event.stats.summary()}")
