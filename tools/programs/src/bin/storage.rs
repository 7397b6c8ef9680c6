//! What few bytes cost in accuracy, on the U-Net of a real base: `cargo run --release --bin storage BASE`. For each
//! storage: bytes of the layers' weights, how far the weights and the U-Net's answers are from the base in f32 (L2, as a
//! share; answers on noised random latents and random text states at four timesteps), and the largest share of any layer.

use lora_core::variant::BaseLayer;
use lora_io::checkpoint::Checkpoint;
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Unet, load_unet};
use lora_models::weights::{Frozen, Held};
use lora_tools::Answer;
use lora_torch::frozen::Storage;
use lora_torch::tch::{Device, Kind, Tensor, manual_seed, no_grad};

const STORAGES: [Storage; 5] = [Storage::Half, Storage::BFloat16, Storage::Int8, Storage::Float8, Storage::Nf4];
const TIMESTEPS: [f64; 4] = [50.0, 300.0, 600.0, 950.0];

fn main() -> Answer<()> {
    let path = std::env::args().nth(1).ok_or("expected a base model, a file or a folder")?;
    let checkpoint = Checkpoint::open(path)?;
    let load = |storage| load_unet(&checkpoint, Kind::Float, Device::Cpu, Held::Frozen(Frozen::stored(storage)));
    let mut whole = load(None)?;
    let (weights, answers) = (weights(&mut whole)?, answers(&whole)?);
    println!("fp32: {:.2} MiB in {} layers", mib(&mut whole)?, weights.len());
    println!("storage | MiB | weights | worst layer | answers");
    for storage in STORAGES {
        let mut own = load(Some(storage))?;
        let bytes = mib(&mut own)?;
        let own_weights = self::weights(&mut own)?;
        let worst = weights.iter().zip(&own_weights).map(|pair| apart(&[pair])).fold(0.0, f64::max);
        let all = apart(&weights.iter().zip(&own_weights).collect::<Vec<_>>());
        let own_answers = self::answers(&own)?;
        let answered = apart(&answers.iter().zip(&own_answers).collect::<Vec<_>>());
        println!("{storage} | {bytes:.2} | {all:.1e} | {worst:.1e} | {answered:.1e}");
    }
    Ok(())
}

/// Weights of all layers, whole.
fn weights(unet: &mut Unet) -> Answer<Vec<Tensor>> {
    let mut all = Vec::new();
    unet.visit_layers(&mut |layer| all.push(layer.weight()))?;
    Ok(all.into_iter().collect::<Result<_, _>>()?)
}

/// What it says to the same inputs at each timestep.
fn answers(unet: &Unet) -> Answer<Vec<Tensor>> {
    manual_seed(7);
    let config = unet.config();
    let latents = Tensor::randn([2, config.latent_channels as i64, 8, 8], (Kind::Float, Device::Cpu));
    let context = Tensor::randn([2, 77, config.context as i64], (Kind::Float, Device::Cpu));
    let answer = |&time: &f64| no_grad(|| unet.forward(&latents, &[time, time], &context, &Pass::default()));
    Ok(TIMESTEPS.iter().map(answer).collect::<Result<_, _>>()?)
}

/// The L2 norm of all differences as a share of that of what is expected.
fn apart(pairs: &[(&Tensor, &Tensor)]) -> f64 {
    let square = |tensor: &Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
    let (mut difference, mut expected) = (0.0, 0.0);
    for (whole, own) in pairs {
        difference += square(&(*own - *whole));
        expected += square(whole);
    }
    (difference / expected).sqrt()
}

/// Mebibytes of the layers' weights.
fn mib(unet: &mut Unet) -> Answer<f64> {
    let mut bytes = 0;
    unet.visit_layers(&mut |layer| bytes += layer.weight_bytes())?;
    Ok(bytes as f64 / f64::from(1 << 20))
}
