#!/bin/bash
MODEL=base.safetensors
accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py \
  --pretrained_model_name_or_path "$MODEL" \
  --train_data_dir pictures --output_dir out --resolution 1024,1024 \
  --network_module lycoris.kohya --network_dim 8 --network_alpha 8 \
  --network_args algo=lokr factor=8 conv_dim=8 conv_alpha=8 \
  --network_train_unet_only --learning_rate 1.0 \
  --optimizer_type Prodigy --optimizer_args decouple=True d_coef=2 use_bias_correction=True safeguard_warmup=True \
  --max_train_steps 500 --mixed_precision bf16 --full_bf16 --xformers --no_half_vae --fp8_base
