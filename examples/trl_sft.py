"""TRL's SFTTrainer with token weights: conversations, LoRA, packing. Needs trl.

python examples/trl_sft.py
"""

import tempfile

import toy
from datasets import Dataset
from peft import LoraConfig
from vcore_train import VcoreSFTConfig, VcoreSFTTrainer

model, tokenizer = toy.load()
# A real checkpoint brings its own; TRL adds the marks of generation to those it knows.
tokenizer.chat_template = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)
conversations = [
    {
        "messages": [
            {"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": problem.response},
        ]
    }
    for problem in toy.PROBLEMS
]
with tempfile.TemporaryDirectory() as folder:
    trainer = VcoreSFTTrainer(
        model,
        VcoreSFTConfig(
            folder,
            kl_budget=0.02,  # the one line that SFTConfig does not have
            assistant_only_loss=True,
            packing=True,
            max_length=256,
            per_device_train_batch_size=2,
            **toy.OPTIONS,
        ),
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
toy.show(trainer)
