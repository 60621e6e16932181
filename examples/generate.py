"""Generate in Python: python examples/generate.py"""

from redrafter_mlx import load, load_drafter, stream_generate

model, tokenizer = load("demo")
drafter = load_drafter("auto", model)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Why do cats purr?"}], add_generation_prompt=True
)
for event in stream_generate(model, tokenizer, prompt, drafter=drafter, max_tokens=60):
    print(event.text, end="", flush=event.end_of_round)
print(f"\n{event.stats.summary()}")
