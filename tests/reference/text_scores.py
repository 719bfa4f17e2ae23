"""transformers' answers to text tasks, without a module of this program.

    python text_scores.py FOLDER FILE NEW

prints a JSON object: for each record of a file the mean log-probability of its target after its prompt, and the greedy
continuation of the prompt by NEW tokens.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def main(folder: Path, file: Path, new: int) -> None:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores, texts = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt, target = (torch.tensor([tokenizer(record[key])["input_ids"]]) for key in ("prompt", "target"))
        with torch.no_grad():
            logits = model(torch.cat([prompt, target], dim=1)).logits[0, prompt.shape[1] - 1 : -1].double()
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
        logprobs = torch.log_softmax(logits, -1)[torch.arange(target.shape[1]), target[0]]
        scores.append(float(logprobs.mean()))
        texts.append(tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True))
    assert not any(name.startswith(("evojax_merge", "jax")) for name in sys.modules)
    print(json.dumps({"scores": scores, "texts": texts, "model_type": model.config.model_type}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
