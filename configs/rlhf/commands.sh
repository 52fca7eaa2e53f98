#!/usr/bin/env bash
# RLHF from end to end on the shapes world, and DPO on the same labels; about ten minutes on 2 CPU cores.
# Run it in the repository's folder: bash configs/rlhf/commands.sh
set -euo pipefail

# 1. Judgements: four images of each prompt, told apart by noisy annotators who mean the gold verifier.
python run.py label --pretrained shapes-sd3 --prompts shapes-mixture --limit 1000 \
    --images_per_prompt 4 --num_inference_steps 4 --guidance_scale 1 \
    --reward ShapesVerifier --temperature 0.1 --output runs/preferences/shapes-sd3

# 2. A reward model of them.
python run.py fit --config configs/rlhf/shapes-sd3_reward_model.yaml
python run.py export --ckpt_path runs/rlhf_reward_model/version_0/checkpoints/last.ckpt \
    --output runs/rlhf_reward_model/exported

# 3. DDPO on the reward model, held near the base model by a KL penalty.
python run.py fit --config configs/rlhf/shapes-sd3_ddpo.yaml

# Instead of 2 and 3: DPO on the judgements themselves.
python run.py fit --config configs/rlhf/shapes-sd3_dpo.yaml

# Both beside the base model.
python run.py compare runs/rlhf_shapes-sd3_ddpo runs/rlhf_shapes-sd3_dpo --output runs/rlhf_comparison
