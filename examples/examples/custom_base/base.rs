//! A base model that the libraries do not know: a small network that sees noise in pictures, as a value that they train, plan,
//! save and resume like their own. Here is all that it takes: the family (how its file is told and its layers are named), a
//! configuration key, the network, the base, and a file of untrained weights. What is done with it is in `main`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::{Component, DType, HostTensor};
use lora_data::source::Example;
use lora_io::checkpoint::{Checkpoint, CheckpointSource, write_single_file};
use lora_io::family::adapter::Signs;
use lora_io::family::tree::Canonical;
use lora_io::family::{ComponentNames, Family, KohyaNames, Names};
use lora_models::layers::{Adaptable, AdaptableLayer, Pass, exclusive};
use lora_models::weights::{Held, SyntheticWeights, Weights};
use lora_torch::checkpoint::Shared;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::{from_f32, kind_of};
use lora_train::base::{Base, Inputs, Item, Network, Opening, PICTURES, Registration};
use lora_train::config::keys::{Group, Key, Reads, Resumed, Setting};
use lora_train::{Error, Result};

/// The network's name in paths: `denoiser.blocks.0.conv1`.
pub(crate) const DENOISER: Component = Component::constant("denoiser");

/// What people call it.
const TITLE: &str = "pixel denoiser";

/// How its files are told, and how its layers are named in them and in kohya's adapters (`lora_denoiser_blocks_0_conv1`).
pub(crate) static FAMILY: Family = Family {
    name: "pixel-denoiser",
    title: TITLE,
    image: true,
    tells: |base| base.begins("pixel_denoiser."),
    components: &[ComponentNames {
        component: DENOISER,
        folder: None,
        single_file: Some(Names { place: "pixel_denoiser.", tree: &Canonical }),
        kohya: Some(KohyaNames { prefix: "lora_denoiser", tree: None }),
        required: true,
    }],
    words: &[&["first", "blocks", "conv1", "conv2", "last"]],
    signs: Signs::NONE,
    labels: None,
    layers: Vec::new,
    block_factors: None,
};

/// Its own key: how much noise it sees at most.
static KEYS: &[&Group] = &[&Group {
    section: "Pixel denoiser",
    behind: None,
    keys: &[Key {
        name: "strongest_noise",
        values: "above 0",
        default: "1.0",
        meaning: "Deviation of the strongest noise, where pixels go from -1 to 1.",
        memory: "",
        resumed: Resumed::Fixed(|config| config.extra.shown("strongest_noise")),
        reads: Reads::Extra(|given| Setting::Number(given.positive().unwrap_or(1.0))),
    }],
}];

/// What [`lora_train::Plugins::register_base`] takes.
pub(crate) const PIXEL_DENOISER: Registration =
    Registration { family: &FAMILY, keys: KEYS, data: PICTURES, remedies: "a lower max_resolution", open };

/// Channels that the network computes with.
const WIDTH: usize = 32;

/// Levels of noise at which a picture is judged.
const JUDGED_LEVELS: usize = 8;

/// From a noisy picture and how strong its noise is to the noise.
#[derive(Debug)]
struct Denoiser {
    first: AdaptableLayer,
    blocks: Vec<Shared<Block>>,
    last: AdaptableLayer,
}

/// Two convolutions beside the identity.
#[derive(Debug)]
struct Block {
    conv1: AdaptableLayer,
    conv2: AdaptableLayer,
}

impl Denoiser {
    fn new(weights: &Weights<'_>) -> lora_models::Result<Self> {
        let conv = |weights: &Weights<'_>, inputs, outputs| AdaptableLayer::conv2d(weights, inputs, outputs, 3, 1);
        let block = |index: usize| {
            let at = weights.at("blocks").at(index);
            Ok(Shared::new(Block {
                conv1: conv(&at.at("conv1"), WIDTH, WIDTH)?,
                conv2: conv(&at.at("conv2"), WIDTH, WIDTH)?,
            }))
        };
        Ok(Self {
            first: conv(&weights.at("first"), 4, WIDTH)?,
            blocks: (0..2).map(block).collect::<lora_models::Result<_>>()?,
            last: conv(&weights.at("last"), WIDTH, 3)?,
        })
    }

    /// `[batch, 4, height, width]`, the strength of the noise being the fourth channel, to `[batch, 3, height, width]`.
    fn forward(&self, noisy: &Tensor, pass: &Pass) -> lora_models::Result<Tensor> {
        let mut state = self.first.forward(noisy, pass)?;
        for block in &self.blocks {
            state = pass.block(block, &[&state], |block, inputs, pass| block.forward(&inputs[0], pass))?;
        }
        self.last.forward(&state, pass)
    }
}

impl Block {
    fn forward(&self, state: &Tensor, pass: &Pass) -> lora_models::Result<Tensor> {
        let inner = self.conv1.forward(&state.f_silu()?, pass)?;
        Ok(self.conv2.forward(&inner.f_silu()?, pass)?.f_add(state)?)
    }
}

impl Adaptable for Denoiser {
    fn component(&self) -> Component {
        DENOISER
    }

    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> lora_models::Result<()> {
        visit(&mut self.first);
        for block in &mut self.blocks {
            let Block { conv1, conv2 } = exclusive(block)?;
            visit(conv1);
            visit(conv2);
        }
        visit(&mut self.last);
        Ok(())
    }
}

/// The base: one network, which sees pictures as they are.
#[derive(Debug)]
struct PixelDenoiser {
    networks: [Network; 1],
    checkpoint: Arc<Checkpoint>,
    device: Device,
    kind: Kind,
    learning_rate: f64,
    strongest: f64,
    denoiser: Option<Denoiser>,
}

fn open(opening: &Opening<'_>) -> Result<Box<dyn Base>> {
    Ok(Box::new(PixelDenoiser {
        networks: [Network { component: DENOISER, title: TITLE, trains: true, encodes: None }],
        checkpoint: Arc::clone(&opening.checkpoint),
        device: opening.device,
        kind: kind_of(opening.precision),
        learning_rate: opening.config.learning_rate,
        strongest: opening.config.extra.number("strongest_noise").unwrap_or(1.0),
        denoiser: None,
    }))
}

impl PixelDenoiser {
    /// A picture with noise of each of these strengths, with the noise: what the loss reads of an item.
    fn noisy(&self, item: &Item, strengths: &[f64], draw: &Stream) -> Result<Noisy> {
        let Some(Example::Picture(sample)) = &item.example else {
            return Err(Error::MissingEncoding { network: DENOISER, name: "a picture" });
        };
        let pixels = sample.picture.to_planar();
        let mut own = Noisy { size: (sample.picture.height(), sample.picture.width()), ..Noisy::default() };
        let mut random = draw.at("noise");
        for &strength in strengths {
            let noise = random.normals(pixels.len());
            own.inputs.extend(pixels.iter().zip(&noise).map(|(pixel, noise)| pixel + strength as f32 * noise));
            own.inputs.extend(std::iter::repeat_n(strength as f32, pixels.len() / 3));
            own.noise.extend(noise);
        }
        Ok(own)
    }

    /// The tensors of a micro-batch, whose pictures are of one size.
    fn tensors(&self, all: &[Noisy], weights: &[f32]) -> Result<Inputs> {
        let (height, width) = all.first().map_or((0, 0), |noisy| noisy.size);
        let tensor = |part: fn(&Noisy) -> &[f32], channels: usize| {
            let values: Vec<f32> = all.iter().flat_map(part).copied().collect();
            from_f32(&values, &[weights.len(), channels, height, width], self.device)
        };
        Ok(Inputs::default()
            .with("noisy", Some(tensor(|noisy| &noisy.inputs, 4)?))
            .with("noise", Some(tensor(|noisy| &noisy.noise, 3)?))
            .with("weights", Some(from_f32(weights, &[weights.len(), 1, 1, 1], self.device)?)))
    }
}

/// A picture with noise and its strength, and that noise, on the host.
#[derive(Default)]
struct Noisy {
    size: (usize, usize),
    inputs: Vec<f32>,
    noise: Vec<f32>,
}

impl Base for PixelDenoiser {
    fn networks(&self) -> &[Network] {
        &self.networks
    }

    fn load(&mut self, network: Component, held: Held) -> Result<()> {
        let weights = Weights::new(self.checkpoint.component(network)?, self.kind, self.device).held(held);
        self.denoiser = Some(Denoiser::new(&weights)?);
        Ok(())
    }

    fn unload(&mut self, _network: Component) {
        self.denoiser = None;
    }

    fn is_loaded(&self, _network: Component) -> bool {
        self.denoiser.is_some()
    }

    fn adaptable(&mut self, _network: Component) -> Option<&mut dyn Adaptable> {
        self.denoiser.as_mut().map(|network| network as &mut dyn Adaptable)
    }

    fn learning_rate(&self, _network: Component) -> f64 {
        self.learning_rate
    }

    fn inputs(&self, items: &[Item]) -> Result<Inputs> {
        let noisy = |item: &Item| {
            let strength = self.strongest * f64::from(item.draw.at("strength").uniform());
            self.noisy(item, &[strength], &item.draw)
        };
        let all = items.iter().map(noisy).collect::<Result<Vec<_>>>()?;
        let weights: Vec<f32> = items.iter().map(|item| item.weight as f32).collect();
        self.tensors(&all, &weights)
    }

    fn validation_inputs(&self, item: &Item) -> Result<Inputs> {
        let level = |index: usize| self.strongest * (index as f64 + 0.5) / JUDGED_LEVELS as f64;
        let levels: Vec<f64> = (0..JUDGED_LEVELS).map(level).collect();
        self.tensors(&[self.noisy(item, &levels, &item.draw)?], &[1.0; JUDGED_LEVELS])
    }

    fn loss(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let denoiser = self.denoiser.as_ref().ok_or(Error::NotLoaded { network: TITLE })?;
        let answer = denoiser.forward(&inputs.get("noisy")?.f_to_kind(self.kind)?, pass)?;
        let error = answer.f_to_kind(Kind::Float)?.f_sub(inputs.get("noise")?)?;
        Ok(error.f_square()?.f_mul(inputs.get("weights")?)?.f_mean(Kind::Float)?)
    }
}

/// A file of such a base whose weights have learnt nothing.
struct Untrained(SyntheticWeights);

impl CheckpointSource for Untrained {
    fn family(&self) -> &'static Family {
        &FAMILY
    }

    fn components(&self) -> Vec<Component> {
        vec![DENOISER]
    }

    fn weights(&self, _component: Component) -> Vec<(String, Vec<usize>)> {
        self.0.made()
    }

    fn values(&self, _component: Component, name: &str, shape: &[usize]) -> lora_io::Result<HostTensor> {
        Ok(self.0.values(name, shape))
    }
}

/// Writes a base whose weights have learnt nothing.
///
/// # Errors
/// Where the file cannot be written.
pub(crate) fn write_untrained(path: &Path) -> Result<()> {
    let made = SyntheticWeights::new(DENOISER.name());
    // A network that is built asks for all of its weights.
    Denoiser::new(&Weights::new(&made, Kind::Float, Device::Cpu))?;
    write_single_file(path, &Untrained(made), DType::F32, &BTreeMap::new())?;
    Ok(())
}
