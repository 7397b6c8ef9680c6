//! tmp
use lora_models::layers::*;
use lora_models::stable_diffusion::*;
use lora_models::weights::*;
use lora_torch::tch::{Device, Kind, Tensor};

#[test]
fn smoke() {
    let src = SyntheticWeights::new("unet");
    let cfg = UnetConfig {
        latent_channels: 4,
        channels: vec![32, 64, 64, 64],
        attention: vec![true, true, true, false],
        heads: vec![8; 4],
        layers_per_block: 2,
        transformer_depth: 1,
        context: 128,
        norm_groups: 32,
        linear_projection: false,
    };
    let mut unet = Unet::new(&Weights::new(&src, Kind::Float, Device::Cpu), cfg).unwrap();
    println!("{} {}", src.made().len(), unet.adaptable_layers().len());
    let y = unet
        .forward(
            &Tensor::randn([2, 4, 9, 7], (Kind::Float, Device::Cpu)),
            &[10., 999.],
            &Tensor::randn([2, 77, 128], (Kind::Float, Device::Cpu)),
            &Pass::default(),
        )
        .unwrap();
    println!("{:?} {:?}", y.size(), y.std(true));
    let src = SyntheticWeights::new("vae");
    let vae = Vae::new(
        &Weights::new(&src, Kind::Float, Device::Cpu),
        VaeConfig {
            latent_channels: 4,
            channels: vec![32, 32, 64, 64],
            layers_per_block: 2,
            norm_groups: 32,
            scaling_factor: 0.18215,
        },
    )
    .unwrap();
    let d = vae.encode(&Tensor::randn([2, 3, 64, 48], (Kind::Float, Device::Cpu))).unwrap();
    println!("{} {:?} {:?}", src.made().len(), d.mean.size(), vae.decode(&d.mean).unwrap().size());
    let src = SyntheticWeights::new("text_encoder");
    let te = ClipTextEncoder::new(
        &Weights::new(&src, Kind::Float, Device::Cpu),
        ClipConfig { vocabulary: 49408, width: 128, intermediate: 512, layers: 3, heads: 2, exact_gelu: false },
    )
    .unwrap();
    let y = te.encode(&Tensor::zeros([4, 77], (Kind::Int64, Device::Cpu)), 2, 2, &Pass::default()).unwrap();
    println!("{} {:?}", src.made().len(), y.size());
}
