"""How a peer is measured, whatever it is: a session is started over and fed with ids.

A session has `start()`, which forgets all, and `feed(ids)`, which computes the ids and returns the best next token.
"""

import random
import statistics
import time

# The first round warms up.
ROUNDS = 4


def tokens_per_second(work, count):
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def measure(session, prompt, steps, prefill):
    """Tokens per second, medians of the rounds: of `steps` decode steps after `prompt` tokens, and of `prefill` tokens."""
    ids = random.Random(0).choices(range(1000, 20000), k=max(prompt, prefill))
    decode_rates, prefill_rates = [], []
    for _ in range(ROUNDS):
        session.start()
        prefill_rates.append(tokens_per_second(lambda: session.feed(ids[:prefill]), prefill))
        session.start()
        token = session.feed(ids[:prompt])

        def decode():
            nonlocal token
            for _ in range(steps):
                token = session.feed([token])

        decode_rates.append(tokens_per_second(decode, steps))
    return {"decode": statistics.median(decode_rates[1:]), "prefill": statistics.median(prefill_rates[1:])}
