accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/qwen_image_train_network.py \
  --dit dit.safetensors --vae vae.safetensors --text_encoder te.safetensors --model_version original \
  --sdpa --mixed_precision bf16 --timestep_sampling qwen_shift --weighting_scheme none \
  --optimizer_type adamw8bit --learning_rate 5e-5 --optimizer_args weight_decay=0.01 betas=0.9,0.99 \
  --network_module networks.lora_qwen_image --network_dim 16 --network_alpha 8 --base_weights turbo.safetensors \
  --gradient_checkpointing --gradient_checkpointing_cpu_offload --fp8_base --fp8_scaled --blocks_to_swap 16 \
  --max_train_steps 800 --save_every_n_steps 200 --seed 42 --output_dir out --output_name mine
