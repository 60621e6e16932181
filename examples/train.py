"""Train a head and use it: python examples/train.py DIRECTORY [MINUTES]"""

import subprocess
import sys

from redrafter_mlx import load, load_drafter, stream_generate

directory, minutes = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
command = [sys.executable, "-m", "redrafter_mlx.train", "--model", "demo", "--output", directory]
subprocess.run([*command, "--minutes", minutes, *sys.argv[3:]], check=True)

model, tokenizer = load("demo")
drafter = load_drafter(f"union:[{directory},max_gram]", model)
for event in stream_generate(model, tokenizer, "Tides are", drafter=drafter, max_tokens=40):
    print(event.text, end="", flush=event.end_of_round)
print(f"\n{event.stats.summary()}")
