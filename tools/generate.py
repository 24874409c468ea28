"""Continue text with an exported model, through `transformers` alone.

python tools/generate.py --model DIR --prompt "def read_lines(path):"
"""

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Parse the command line, generate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of convert_to_hf.py")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write prompts and texts as JSON")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"error: {args.model} holds no exported model: run tools/convert_to_hf.py")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(
        args.model, padding_side="left", trust_remote_code=True
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype="auto")
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    batch = tokenizer(args.prompt, return_tensors="pt", padding=True).to(model.device)
    ids = model.generate(**batch, max_new_tokens=args.max_new_tokens, **sampling)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].size(1) :], skip_special_tokens=True)
    samples = [{"prompt": p, "text": t} for p, t in zip(args.prompt, texts, strict=True)]
    for sample in samples:
        print(
            f"{sample['prompt']}\033[1m{sample['text']}\033[0m\n"
            if sys.stdout.isatty()
            else f"{sample['prompt']}{sample['text']}\n"
        )
    if args.output:
        temporary = args.output.with_name(args.output.name + ".tmp")
        temporary.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n")
        os.replace(temporary, args.output)


if __name__ == "__main__":
    main()
