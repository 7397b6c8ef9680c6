//! PEFT's adapters on bare parameters (`target_parameters`): the experts of a mixture, whose weights are one tensor.
//!
//! A module with several such parameters is wrapped once for each, the first declared innermost, so that keys tell a
//! parameter by how many `base_layer` they have: with both, `mlp.experts.lora_A` is `down_proj`'s and
//! `mlp.experts.base_layer.lora_A` is `gate_up_proj`'s. For E experts `lora_A` is `[E · rank, inputs]`, experts first, and
//! `lora_B` is `[outputs, rank · E]`, experts last.

use std::collections::BTreeMap;

use lora_core::variant::{EXPERTS_DOWN, EXPERTS_UP};
use lora_core::{AdapterModule, HostTensor, ModulePath};

use super::names;

/// Parameters of modules of experts in the order of their declaration.
const DECLARED: [&str; 3] = ["gate_up_proj", "up_proj", "down_proj"];

/// What wraps a wrapped module.
const WRAPPED: &str = ".base_layer";

/// The parameters that a configuration names.
#[derive(Debug, Default)]
pub(super) struct TargetParameters(Vec<String>);

impl TargetParameters {
    pub(super) fn new(named: Vec<String>) -> Self {
        Self(named)
    }

    /// The path of a key's module: with its parameter, where that is not the module's weight.
    ///
    /// # Errors
    /// If several parameters of a module are adapted whose order is not known here.
    pub(super) fn path(&self, name: &str) -> Result<ModulePath, String> {
        let bare = name.trim_end_matches(WRAPPED);
        let depth = (name.len() - bare.len()) / WRAPPED.len();
        let mut own: Vec<&str> = self.0.iter().filter_map(|parameter| of_module(parameter, bare)).collect();
        own.sort_by_key(|parameter| DECLARED.iter().position(|known| known == parameter));
        own.dedup();
        if own.is_empty() {
            return Ok(names::from_dotted(name));
        }
        if own.len() > 1 && own.iter().any(|parameter| !DECLARED.contains(parameter)) {
            return Err(format!("which of {} is wrapped first is not known here", own.join(", ")));
        }
        let parameter = own.len().checked_sub(depth + 1).map(|place| own[place]);
        let parameter = parameter.ok_or_else(|| format!("is wrapped more often than {} are there", own.join(", ")))?;
        Ok(names::from_dotted(&format!("{bare}.{parameter}")))
    }

    /// Whether a path is one of these.
    pub(super) fn contains(&self, path: &ModulePath) -> bool {
        let Some((module, parameter)) = path.path.rsplit_once('.') else { return false };
        self.0.iter().any(|own| of_module(own, module) == Some(parameter))
    }
}

/// The parameter that a target means in a module; none if it means none, or its weight.
fn of_module<'p>(target: &'p str, module: &str) -> Option<&'p str> {
    let (of, parameter) = match target.rsplit_once('.') {
        Some((of, parameter)) => (of, parameter),
        // PEFT writes the names of parameters alone where it took them for those of layers.
        None => ("experts", target),
    };
    let fits = module.strip_suffix(of).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    (fits && parameter != "weight").then_some(parameter)
}

/// A plain LoRA as PEFT stores it for all experts, taken apart by experts.
pub(super) fn by_expert(module: AdapterModule, rank: usize) -> Result<AdapterModule, String> {
    let factors = module.factors().ok_or("is no plain LoRA, which adapters on parameters are")?;
    let (&[all, inputs], &[outputs, same]) = (factors.down.shape(), factors.up.shape()) else {
        return Err("its factors are no matrices".into());
    };
    if rank == 0 || all != same || !all.is_multiple_of(rank) {
        return Err(format!("{all} rows and {same} columns are no experts of rank {rank}"));
    }
    let experts = all / rank;
    let numbers = factors.up.to_f32();
    let place = |expert: usize, output: usize, r: usize| (output * rank + r) * experts + expert;
    let up = (0..experts).flat_map(|expert| {
        let numbers = &numbers;
        (0..outputs).flat_map(move |output| (0..rank).map(move |r| numbers[place(expert, output, r)]))
    });
    let up = HostTensor::from_f32([experts, outputs, rank], up.collect()).map_err(|error| error.to_string())?;
    let up = up.to_dtype(factors.up.dtype());
    let down = factors.down.clone().reshape([experts, rank, inputs]).map_err(|error| error.to_string())?;
    let tensors = BTreeMap::from([(EXPERTS_DOWN.to_owned(), down), (EXPERTS_UP.to_owned(), up)]);
    Ok(AdapterModule { variant: module.variant.clone(), tensors, rank, alpha: module.alpha })
}

/// Factors of experts as PEFT stores them, `lora_A` and `lora_B`; none of a module that has others.
pub(super) fn of_all_experts(module: &AdapterModule) -> Option<Result<[HostTensor; 2], String>> {
    let [down, up] = [EXPERTS_DOWN, EXPERTS_UP].map(|name| module.tensors.get(name));
    let (down, up) = (down?, up?);
    let stored = || -> Result<[HostTensor; 2], String> {
        let (&[experts, rank, inputs], &[same, outputs, other]) = (down.shape(), up.shape()) else {
            return Err("its factors are not those of experts".into());
        };
        if experts != same || rank != other {
            return Err(format!("its factors {:?} and {:?} do not go together", down.shape(), up.shape()));
        }
        let numbers = up.to_f32();
        let place = |output: usize, r: usize, expert: usize| (expert * outputs + output) * rank + r;
        let turned = (0..outputs).flat_map(|output| {
            let numbers = &numbers;
            (0..rank).flat_map(move |r| (0..experts).map(move |expert| numbers[place(output, r, expert)]))
        });
        let turned =
            HostTensor::from_f32([outputs, rank * experts], turned.collect()).map_err(|error| error.to_string())?;
        let down = down.clone().reshape([experts * rank, inputs]).map_err(|error| error.to_string())?;
        Ok([down, turned.to_dtype(up.dtype())])
    };
    Some(stored())
}

/// The name of a parameter's wrapper, where others of its module are adapted as `is_adapted` says.
pub(super) fn wrapper_of(path: &str, is_adapted: impl Fn(&str) -> bool) -> Option<String> {
    let (module, parameter) = path.rsplit_once('.')?;
    let declared = DECLARED.iter().position(|known| *known == parameter)?;
    let later = DECLARED[declared + 1..].iter().filter(|other| is_adapted(&format!("{module}.{other}"))).count();
    Some(format!("{module}{}", WRAPPED.repeat(later)))
}

/// What `target_parameters` calls a parameter: its name in its layer.
pub(super) fn target_of(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    let layer = parts.iter().rposition(|part| part.parse::<u32>().is_ok()).map_or(0, |place| place + 1);
    parts[layer..].join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_experts_come_back_as_they_were() {
        let numbers = |shape: [usize; 3]| {
            let count = shape.iter().product::<usize>();
            HostTensor::from_f32(shape, (0..count).map(|number| number as f32).collect()).unwrap()
        };
        let tensors = BTreeMap::from([
            (EXPERTS_DOWN.to_owned(), numbers([3, 2, 5])),
            (EXPERTS_UP.to_owned(), numbers([3, 4, 2])),
        ]);
        let module = AdapterModule { variant: "lora".into(), tensors, rank: 2, alpha: 2.0 };
        let [down, up] = of_all_experts(&module).unwrap().unwrap();
        // Of expert 1, output 2 and rank 1: experts are last.
        assert_eq!((up.shape(), up.to_f32()[(2 * 2 + 1) * 3 + 1]), (&[4, 6][..], 13.0));
        let stored = AdapterModule::of_factors(down, up, false, 2, 2.0);
        assert_eq!(by_expert(stored, 2).unwrap().tensors, module.tensors);
        let path = "model.layers.3.mlp.experts.gate_up_proj";
        assert_eq!(
            wrapper_of(path, |other| other.ends_with(".down_proj")).unwrap(),
            "model.layers.3.mlp.experts.base_layer"
        );
        assert_eq!(wrapper_of(path, |_| false).unwrap(), "model.layers.3.mlp.experts");
        assert_eq!(target_of(path), "mlp.experts.gate_up_proj");
    }

    #[test]
    fn how_often_a_module_is_wrapped_tells_the_parameter() {
        let both = TargetParameters::new(
            ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"].map(str::to_owned).into(),
        );
        let path = |name: &str| both.path(name).map(|path| path.path);
        let of = |part: &str| Ok(format!("model.layers.0.mlp.{part}"));
        assert_eq!(path("base_model.model.model.layers.0.mlp.experts"), of("experts.down_proj"));
        assert_eq!(path("base_model.model.model.layers.0.mlp.experts.base_layer"), of("experts.gate_up_proj"));
        assert_eq!(path("base_model.model.model.layers.0.mlp.gate"), of("gate"));
        assert!(path("base_model.model.model.layers.0.mlp.experts.base_layer.base_layer").is_err());
        let alone = TargetParameters::new(vec!["gate_up_proj".into()]);
        assert_eq!(
            alone.path("base_model.model.model.layers.0.mlp.experts").unwrap().path,
            "model.layers.0.mlp.experts.gate_up_proj"
        );
        assert_eq!(alone.path("model.layers.0.mlp.up_proj").unwrap().path, "model.layers.0.mlp.up_proj");
    }
}
