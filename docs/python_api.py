"""Select, evaluate, export and serve: python docs/python_api.py MODEL [vLLM options]."""

import subprocess
import sys

from sleb_serve import EvalConfig, SelectConfig, evaluate, export, select, serve_command

model, *options = sys.argv[1:]
text = "python-docs"  # in every Python; or "wikitext2", "c4", a file of your own

config = SelectConfig(remove=2, calibration=text, sequences=8, sequence_length=256)
manifest = select(model, config)
print(manifest.blocks, manifest.dense_loss, [removal.loss for removal in manifest.removed])

judged = EvalConfig(blocks=(0, 1, 2), perplexity=(text,), sequence_length=256, sequences=8)
for result in evaluate(model, manifest, judged)["results"]:
    print(result["blocks"], result["perplexity"][text])

print(export(model, manifest, "pruned-model"))

subprocess.run(serve_command(model, manifest, options), check=True)
