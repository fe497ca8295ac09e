# %% [markdown]
# # qorpo in five minutes
# From preference pairs to a merged model, on the tiny base and the pairs that come with qorpo. No GPU, nothing to download.
# Run it as a script, or cell by cell in an editor that knows `# %%`.

# %%
import tempfile
from pathlib import Path

import qorpo

folder = Path(tempfile.mkdtemp(prefix="qorpo-quickstart-"))

# %% [markdown]
# ## The data
# A pair is a prompt with a better and a worse answer. The prompts are a user's messages.

# %%
pairs = qorpo.load_pairs("demo:eval")
for pair in pairs[:3]:
    print(f"{pair.prompt[-1]['content']}\n  chosen:   {pair.chosen}\n  rejected: {pair.rejected}")

# %% [markdown]
# ## The recipe
# `model.path` and `data.train` are all that a recipe needs. What isn't given keeps its default.

# %%
recipe = {
    "model": {"path": "demo"},
    "data": {"train": "demo", "eval": "demo:eval", "max_length": 256, "max_prompt_length": 128},
    "objective": {"name": "orpo", "lambda": 1.0},
    "train": {"pairs_per_step": 16, "learning_rate": 3e-3, "epochs": 0.5, "eval_every": 0.25},
    "output": str(folder / "run"),
}

# %% [markdown]
# ## Training
# The adapter that is kept is the best one by evaluation loss. Step 0 is the base as it was.

# %%
result = qorpo.train(recipe)
before, after = result.evaluations[0], result.evaluations[result.best_step]
for name in ("eval_rewards/accuracies", "eval_log_odds_ratio", "eval_chosen_logps", "eval_rejected_logps"):
    print(f"{name:25} {before[name]:8.3f} -> {after[name]:8.3f}")

# %% [markdown]
# ## Answers
# The base and the trained adapter, greedily.

# %%
prompts = ["Name the opposite of rich.", "Find the sum of 2 and 5."]
asked = {"base": "demo", "trained": result.output}
answers = {who: qorpo.generate(model, prompts, max_new_tokens=40).answers for who, model in asked.items()}
for place, prompt in enumerate(prompts):
    print(prompt)
    for who in asked:
        print(f"  {who + ':':9}{answers[who][place].text.strip()}")

# %% [markdown]
# ## One model
# The adapter in the base's weights, verified on the held-out pairs. The folder opens in transformers and vLLM.

# %%
merged = qorpo.merge(result.output, folder / "merged")
print(f"merged into {merged.output}")
