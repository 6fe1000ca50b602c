"""What knows only the model, works on a steered and a guarded one: a pipeline, a streamer, adapters, an evaluation.

Inside `steer` every call of the model is edited, whoever makes it. A guarded model is lent out by `guard.calls`: its
`generate` is then the guardrail's own, and goes on record. Needs the packages peft and lm-eval.

python examples/12_other_libraries.py
"""

import tempfile
from pathlib import Path
from threading import Thread

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import TextIteratorStreamer, pipeline

from saeguard import AtLeast, Plan, Rule, load_model, load_sae, steer
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from saeguard.guarding.verify import verify
from saeguard.latents import LatentTable

PROMPTS, GREEDY = ["The journey began in", "Far away, the old captain saw"], {"max_new_tokens": 12, "do_sample": False}
QUESTIONS = [
    {"question": "The travellers looked up and saw", "answers": [" the Earth", " the town"]},
    {"question": "At last they were on their way to", "answers": [" the moon", " the shop"]},
]

model, tokenizer = load_model("smollm2-135m-instruct")
sae = load_sae("smollm2-135m-instruct/resid_post.20")
earth = LatentTable.load(sae.name).search("Earth")[0].row.latent
push = Plan((Rule(sae.name, (earth,), AtLeast(1.0, unit="max")),))
tokenizer.padding_side = "left"

write = pipeline("text-generation", model=model, tokenizer=tokenizer)
with steer(model, push, saes=sae, tokenizer=tokenizer) as run:
    for (answer,) in write(PROMPTS, batch_size=2, **GREEDY):
        print("pipeline  ", answer["generated_text"])
    ears = TextIteratorStreamer(tokenizer, skip_prompt=True)
    told = {**tokenizer(PROMPTS[0], return_tensors="pt"), "streamer": ears, **GREEDY}
    thread = Thread(target=run.bind(model.generate), kwargs=told)  # another thread is inside the block only when bound
    thread.start()
    print("streamer  ", " ".join("".join(ears).split()))
    thread.join()

config = {
    "task": "earth_or_town", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
    "custom_dataset": lambda **_: {"test": Dataset.from_list(QUESTIONS)}, "doc_to_target": 0, "target_delimiter": "",
    "doc_to_choice": lambda doc: doc["answers"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
task = ConfigurableTask(config=config)


def accuracy() -> float:
    """How often the first answer is the likelier one, by lm-eval."""
    lm, tasks = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), TaskManager(include_defaults=False)
    told = simple_evaluate(model=lm, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    return told["results"]["earth_or_town"]["acc,none"]


policy = Policy.of(model, tokenizer, sae, push, name="Earth")
with tempfile.TemporaryDirectory() as folder:
    log = AuditLog(Path(folder) / "audit.jsonl")
    with Guardrail.attach(model, {"earth": policy, "open": None}, tokenizer=tokenizer, saes=sae, audit=log) as guard:
        for name in ("open", "earth"):
            with guard.calls(name):
                print(f"{name:10} ", write(PROMPTS[0], **GREEDY)[0]["generated_text"], f"| lm-eval: {accuracy()}")
    print(f"on record: {verify(log.path).records} requests")

adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
with steer(adapted, push, saes=sae, tokenizer=tokenizer) as run:
    adapted.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), **GREEDY)
print(run.report)
