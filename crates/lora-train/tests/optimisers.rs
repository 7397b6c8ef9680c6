//! Each optimiser against 20 steps of its reference implementation (tools/golden/make_optimisers.py), and its state through a
//! file's worth of tensors.
//!
//! Tolerances are shares of the way that a tensor went. The reference's own way in float32 and in float64 are apart by 1e-6
//! where nothing blows rounding up, by up to 7e-6 for Lion (a sign turns), Adafactor (a mean over one number) and Muon (an iteration), by up to
//! 5e-4 for Prodigy (its d is a quotient of two small sums, and grows from step to step); ours may be three times as far.
//! With 8-bit state a number that lies between two codes may take the other one, which is then worth a hundredth of that
//! number's own way: 4e-4 of the tensor's, where one in five hundred does.

use std::collections::BTreeMap;

use lora_core::HostTensor;
use lora_io::safetensors::SafetensorsFile;
use lora_models::weights::synthetic_uniform;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::from_host;
use lora_train::optimiser::{Arguments, OptimiserRegistry, OptimiserState, Slope};

const STEPS: usize = 20;
const SMALL: [(&str, &[usize]); 5] =
    [("down", &[8, 40]), ("up", &[40, 8]), ("bias", &[33]), ("kernel", &[4, 5, 3, 3]), ("gain", &[1])];
const LARGE: [(&str, &[usize]); 2] = [("wide", &[66, 63]), ("flat", &[4100])];

struct Case {
    golden: &'static str,
    optimiser: &'static str,
    rate: f64,
    arguments: &'static [(&'static str, &'static [f64])],
    tolerance: f64,
}

const OTHER_ADAM: &[(&str, &[f64])] = &[("betas", &[0.8, 0.95]), ("eps", &[1e-4]), ("weight_decay", &[0.1])];

const fn case(
    golden: &'static str,
    optimiser: &'static str,
    rate: f64,
    arguments: &'static [(&'static str, &'static [f64])],
    tolerance: f64,
) -> Case {
    Case { golden, optimiser, rate, arguments, tolerance }
}

const CASES: &[Case] = &[
    case("adamw", "adamw", 1e-3, &[], 3e-6),
    case("adamw.other", "adamw", 1e-3, OTHER_ADAM, 3e-6),
    case("adamw8bit", "adamw8bit", 1e-3, &[], 4e-4),
    case("adamw8bit.other", "adamw8bit", 1e-3, OTHER_ADAM, 4e-4),
    case("adafactor", "adafactor", 1e-3, &[], 3e-6),
    case("adafactor.warmup", "adafactor", 1e-3, &[("warmup_init", &[1.0]), ("scale_parameter", &[0.0])], 1.3e-4),
    case("adafactor.rate", "adafactor", 1e-3, &[("relative_step", &[0.0]), ("scale_parameter", &[0.0])], 3e-6),
    case(
        "adafactor.other",
        "adafactor",
        1e-2,
        &[
            ("relative_step", &[0.0]),
            ("beta1", &[0.9]),
            ("weight_decay", &[0.1]),
            ("clip_threshold", &[0.5]),
            ("decay_rate", &[-0.6]),
        ],
        2.1e-5,
    ),
    case("lion", "lion", 1e-4, &[], 2.1e-5),
    case("lion.other", "lion", 1e-4, &[("betas", &[0.95, 0.98]), ("weight_decay", &[0.1])], 2.1e-5),
    case("prodigy", "prodigy", 1.0, &[], 4.5e-4),
    case(
        "prodigy.usual",
        "prodigy",
        1.0,
        &[
            ("d_coef", &[2.0]),
            ("use_bias_correction", &[1.0]),
            ("safeguard_warmup", &[1.0]),
            ("weight_decay", &[0.01]),
            ("d0", &[1e-4]),
        ],
        3e-5,
    ),
    case(
        "prodigy.other",
        "prodigy",
        0.5,
        &[
            ("betas", &[0.8, 0.99]),
            ("beta3", &[0.9]),
            ("weight_decay", &[0.1]),
            ("decouple", &[0.0]),
            ("growth_rate", &[1.2]),
            ("slice_p", &[3.0]),
        ],
        1.6e-3,
    ),
    case("schedulefree", "adamw_schedulefree", 1e-3, &[], 3.3e-6),
    case(
        "schedulefree.other",
        "adamw_schedulefree",
        1e-3,
        &[
            ("betas", &[0.95, 0.99]),
            ("eps", &[1e-6]),
            ("weight_decay", &[0.1]),
            ("warmup_steps", &[5.0]),
            ("r", &[0.5]),
            ("weight_lr_power", &[1.0]),
        ],
        3.3e-6,
    ),
    case("came", "came", 1e-3, &[], 4.2e-6),
    case(
        "came.other",
        "came",
        1e-3,
        &[
            ("betas", &[0.8, 0.95, 0.99]),
            ("eps", &[1e-20, 1e-12]),
            ("clip_threshold", &[0.5]),
            ("weight_decay", &[0.1]),
        ],
        4.2e-6,
    ),
    case("stableadamw", "stable_adamw", 1e-3, &[], 4.2e-6),
    case("stableadamw.other", "stable_adamw", 1e-3, OTHER_ADAM, 4.2e-6),
    case("muon", "muon", 1e-3, &[("weight_decay", &[0.01])], 1.5e-5),
    case(
        "muon.other",
        "muon",
        1e-3,
        &[
            ("betas", &[0.8, 0.95]),
            ("eps", &[1e-4]),
            ("weight_decay", &[0.1]),
            ("momentum", &[0.8]),
            ("nesterov", &[0.0]),
            ("ns_steps", &[3.0]),
            ("match_rms_adamw", &[0.0]),
        ],
        1.5e-5,
    ),
];

impl Case {
    fn state(&self) -> OptimiserState {
        let arguments: Arguments =
            self.arguments.iter().map(|(name, values)| ((*name).to_owned(), values.to_vec())).collect();
        OptimiserState::new(OptimiserRegistry::default().make(self.optimiser, self.rate, &arguments).unwrap())
    }

    fn parameters(&self) -> BTreeMap<&'static str, Tensor> {
        let large = if self.optimiser == "adamw8bit" { &LARGE[..] } else { &[] };
        SMALL.iter().chain(large).map(|&(name, shape)| (name, first(name, shape))).collect()
    }

    /// Steps `from..to`; Adafactor with relative steps has no learning rate to schedule.
    fn run(&self, state: &mut OptimiserState, parameters: &BTreeMap<&'static str, Tensor>, from: usize, to: usize) {
        let scheduled = !matches!(self.golden, "adafactor" | "adafactor.warmup");
        for step in from..to {
            let factor = ((step + 1) as f64 / 4.0).min(1.0) * (1.0 - step as f64 / 40.0);
            let slopes: Vec<Slope<'_>> = parameters
                .iter()
                .filter_map(|(name, parameter)| {
                    Some(Slope {
                        name,
                        parameter: parameter.shallow_clone(),
                        gradient: gradient(name, &parameter.size(), step)?,
                        learning_rate: if scheduled { self.rate * factor } else { self.rate },
                    })
                })
                .collect();
            state.step(&slopes).unwrap();
        }
    }
}

fn uniform(name: &str, shape: &[usize], scale: f32) -> Tensor {
    let values = synthetic_uniform(&format!("optimiser.{name}"), shape.iter().product()).map(|u| scale * u).collect();
    from_host(&HostTensor::from_f32(shape, values).unwrap(), Device::Cpu).unwrap()
}

fn first(name: &str, shape: &[usize]) -> Tensor {
    uniform(name, shape, if name == "up" { 0.0 } else { 0.1 })
}

/// As `gradient` in make_optimisers.py.
fn gradient(name: &str, shape: &[i64], step: usize) -> Option<Tensor> {
    if name == "bias" && (step == 3 || step == 8) {
        return None;
    }
    let shape: Vec<usize> = shape.iter().map(|&side| side as usize).collect();
    let made =
        uniform(&format!("{name}.slope"), &shape, 0.01) + uniform(&format!("{name}.slope.{step}"), &shape, 0.005);
    if step % 4 == 1 {
        let _ = made.view([-1]).slice(0, None, None, 3).zero_();
    }
    Some(made)
}

fn golden() -> SafetensorsFile {
    SafetensorsFile::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/optimisers.safetensors")).unwrap()
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.to_kind(Kind::Double).norm().double_value(&[])
}

#[test]
fn optimisers_go_the_way_of_their_references() {
    let golden = golden();
    for case in CASES {
        let (mut state, parameters) = (case.state(), case.parameters());
        case.run(&mut state, &parameters, 0, STEPS);
        let expected = |name: &str| {
            from_host(&golden.get(&format!("{}.{name}", case.golden)).unwrap().to_host().unwrap(), Device::Cpu).unwrap()
        };
        for (name, found) in &parameters {
            let start = first(name, &found.size().iter().map(|&side| side as usize).collect::<Vec<_>>());
            let apart = |found: &Tensor, expected: &Tensor| norm(&(found - expected)) / norm(&(expected - &start));
            let share = apart(found, &expected(name));
            assert!(share < case.tolerance, "{}: {name}: {share:e} of the way", case.golden);
            if case.golden.starts_with("schedulefree") {
                let evaluated = state.evaluation(name, found).unwrap().unwrap();
                let share = apart(&evaluated, &expected(&format!("{name}.evaluation")));
                assert!(share < case.tolerance, "{}: {name}, to save: {share:e} of the way", case.golden);
            }
        }
    }
}

/// The codes of an 8-bit state are those of the reference: where a number lies between two codes, rounding may choose the
/// other one, so a few may be one off.
#[test]
fn states_in_8_bits_hold_the_codes_of_bitsandbytes() {
    let golden = golden();
    for case in CASES.iter().filter(|case| case.optimiser == "adamw8bit") {
        let (mut state, parameters) = (case.state(), case.parameters());
        case.run(&mut state, &parameters, 0, STEPS);
        let state = state.state().unwrap();
        for (name, _) in LARGE {
            for part in ["mean", "square"] {
                let key = format!("{}.{name}.{part}", case.golden);
                let codes: Vec<i64> = golden
                    .get(&key)
                    .unwrap()
                    .bytes()
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|w| i64::from_le_bytes(*w))
                    .collect();
                let own: Vec<i64> =
                    Vec::try_from(state[&format!("{name}.{part}")].to_kind(Kind::Int64).view([-1])).unwrap();
                let other = codes.iter().zip(&own).filter(|(a, b)| a != b).count();
                let furthest = codes.iter().zip(&own).map(|(a, b)| (a - b).abs()).max().unwrap();
                assert!(furthest <= 1 && other * 500 < codes.len(), "{key}: {other} differ, by up to {furthest}");
            }
        }
    }
}

#[test]
fn a_state_put_back_goes_on_as_if_never_away() {
    for case in CASES {
        let (mut state, parameters) = (case.state(), case.parameters());
        case.run(&mut state, &parameters, 0, 10);
        let kept: BTreeMap<String, Tensor> =
            state.state().unwrap().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
        let middle: BTreeMap<_, _> = parameters.iter().map(|(name, tensor)| (*name, tensor.copy())).collect();
        case.run(&mut state, &parameters, 10, STEPS);

        let mut again = case.state();
        let names: Vec<(&str, &Tensor)> = middle.iter().map(|(name, tensor)| (*name, tensor)).collect();
        again.register(&names).unwrap();
        again.load_state(&kept).unwrap();
        case.run(&mut again, &middle, 10, STEPS);
        for (name, tensor) in &middle {
            assert_eq!(tensor, &parameters[name], "{}: {name}", case.golden);
        }
    }
}

#[test]
fn a_state_of_another_optimiser_is_refused() {
    let (lion, adamw) = (&CASES[8], &CASES[0]);
    let (mut state, parameters) = (lion.state(), lion.parameters());
    lion.run(&mut state, &parameters, 0, 1);
    let mut other = adamw.state();
    other.register(&parameters.iter().map(|(name, tensor)| (*name, tensor)).collect::<Vec<_>>()).unwrap();
    let error = other.load_state(&state.state().unwrap()).unwrap_err().to_string();
    assert!(error.contains("bias.square") && error.contains("nothing"), "{error}");
}

/// What the table of keys promises of memory, on tensors large enough that small ones do not count.
#[test]
fn bytes_kept_are_those_promised() {
    for (name, least, most) in [
        ("adamw", 8.0, 8.0),
        ("adamw8bit", 2.0, 2.1),
        ("adafactor", 0.0, 0.1),
        ("lion", 4.0, 4.0),
        ("prodigy", 12.0, 16.0),
        ("adamw_schedulefree", 8.0, 8.0),
        ("came", 4.0, 4.1),
        ("muon", 4.0, 4.0),
        ("stable_adamw", 8.0, 8.0),
    ] {
        let chosen = OptimiserRegistry::default().make(name, 1e-4, &Arguments::new()).unwrap();
        let promised = 2 * chosen.optimiser.state_bytes(&[256, 512]);
        let mut state = OptimiserState::new(chosen);
        let (down, up) = (
            Tensor::ones([256, 512], (Kind::Float, Device::Cpu)),
            Tensor::zeros([512, 256], (Kind::Float, Device::Cpu)),
        );
        state.register(&[("down", &down), ("up", &up)]).unwrap();
        let each = state.bytes() as f64 / (2.0 * 256.0 * 512.0);
        assert!((least..=most).contains(&each) && state.bytes() <= promised, "{name}: {each} bytes, {promised}");
    }
}
