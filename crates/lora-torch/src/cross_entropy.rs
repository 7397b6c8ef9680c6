//! The loss of language models: cross entropy of a frozen linear head, without logits `[tokens, words]` ever being in
//! memory as a whole. What is done with the losses, which tokens are labels and how they are shifted is the caller's
//! business.

use tch::Tensor;

use crate::Result;
use crate::frozen::{FrozenWeight, RawStored};
use crate::shim::{RawTensor, new_tensor};

unsafe extern "C" {
    fn lora_cross_entropy(
        hidden: *const RawTensor,
        head: *const RawStored,
        labels: *const RawTensor,
        weights: *const RawTensor,
        smoothing: f64,
        cap: f64,
        scale: f64,
        sums: bool,
        output: *mut *mut RawTensor,
    ) -> std::ffi::c_int;
}

/// How logits and losses are made.
///
/// Everywhere `hidden` is `[…, width]` in f32, bf16 or f16, on the head's device; `head` is the weight `[words,
/// width]`, in whatever form; `labels` are i64 of the shape `[…]`, below the number of words (on a GPU libtorch ends
/// the process's use of it where one is not), and one below 0, as the customary -100, does not count.
///
/// Products are rounded to the type of `hidden`, as those of a layer; what follows, softmax and sums among them, is in
/// f32. Tokens come in chunks whose logits take at most 128 MiB, with what is made of them. A head that is stored in
/// few bytes is made whole once a call, or, beyond 128 MiB, in parts for each chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropy {
    /// The share of a label that is spread evenly over all words, at least 0 and below 1.
    pub label_smoothing: f64,
    /// With it logits become `cap · tanh(logits / cap)`, as Gemma's.
    pub soft_cap: Option<f64>,
    /// What logits are multiplied by, before the cap.
    pub logit_scale: f64,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self { label_smoothing: 0.0, soft_cap: None, logit_scale: 1.0 }
    }
}

impl CrossEntropy {
    /// The sum of the losses of all tokens, f32 without axes, each multiplied by its weight (f32, of the labels' shape)
    /// where there are weights. Gradients reach `hidden` alone. They are computed in the forward pass and kept in the
    /// type of `hidden` in place of anything else, so that a backward pass can be run once.
    ///
    /// # Errors
    /// Where shapes or types are others than [`CrossEntropy`] says, a setting is out of its range, or memory runs out.
    pub fn sum(
        &self,
        hidden: &Tensor,
        head: &FrozenWeight,
        labels: &Tensor,
        weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.losses(hidden, head, labels, weights, true)
    }

    /// The loss of each token, f32 of the labels' shape, 0 where none counts; gradients as those of [`CrossEntropy::sum`].
    ///
    /// # Errors
    /// As [`CrossEntropy::sum`].
    pub fn of_tokens(&self, hidden: &Tensor, head: &FrozenWeight, labels: &Tensor) -> Result<Tensor> {
        self.losses(hidden, head, labels, None, false)
    }

    fn losses(
        &self,
        hidden: &Tensor,
        head: &FrozenWeight,
        labels: &Tensor,
        weights: Option<&Tensor>,
        sums: bool,
    ) -> Result<Tensor> {
        let weights = weights.map_or(std::ptr::null(), Tensor::as_ptr);
        let (hidden, labels, cap) = (hidden.as_ptr(), labels.as_ptr(), self.soft_cap.unwrap_or(0.0));
        let (smoothing, scale) = (self.label_smoothing, self.logit_scale);
        // SAFETY: live `torch::Tensor*`, or null where the shim allows it, for the length of the call; what `raw`
        // points to lives in `head`.
        new_tensor(|output| unsafe {
            let head = head.raw();
            lora_cross_entropy(hidden, &head, labels, weights, smoothing, cap, scale, sums, output)
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Reduction};

    use super::*;
    use crate::frozen::Storage;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    /// Labels, of which every third does not count.
    fn labels(shape: &[i64], words: i64) -> Tensor {
        let labels = Tensor::randint(words, shape, (Kind::Int64, Device::Cpu));
        let place = Tensor::arange(shape.iter().product::<i64>(), (Kind::Int64, Device::Cpu)).view(shape);
        labels.masked_fill(&place.remainder(3).eq(1), -100)
    }

    /// libtorch's own, on logits of the same type.
    fn expected(own: &CrossEntropy, logits: &Tensor, labels: &Tensor) -> Tensor {
        let logits = logits * own.logit_scale;
        let logits = own.soft_cap.map_or_else(|| logits.shallow_clone(), |cap| (&logits / cap).tanh() * cap);
        let (logits, labels) = (logits.flatten(0, -2), labels.flatten(0, -1));
        logits.cross_entropy_loss(&labels, None::<&Tensor>, Reduction::None, -100, own.label_smoothing)
    }

    fn apart(own: &Tensor, other: &Tensor) -> f64 {
        assert_eq!(own.size(), other.size());
        let (own, other) = (own.to_kind(Kind::Double), other.to_kind(Kind::Double));
        ((own - &other).abs().max() / other.abs().max()).double_value(&[])
    }

    const WAYS: [CrossEntropy; 4] = [
        CrossEntropy { label_smoothing: 0.0, soft_cap: None, logit_scale: 1.0 },
        CrossEntropy { label_smoothing: 0.1, soft_cap: None, logit_scale: 0.25 },
        CrossEntropy { label_smoothing: 0.0, soft_cap: Some(3.0), logit_scale: 1.0 },
        CrossEntropy { label_smoothing: 0.2, soft_cap: Some(2.0), logit_scale: 1.5 },
    ];

    #[test]
    fn losses_and_gradients_are_those_of_libtorch_on_whole_logits() {
        crate::seed(11);
        // The last has several chunks, the one before several axes.
        for (shape, words) in [(vec![7], 13), (vec![2, 3, 5], 301), (vec![700], 50_021)] {
            let width = 24;
            let weight = random(&[words, width], Kind::Float);
            let head = FrozenWeight::plain(weight.shallow_clone());
            let states = random(&[&shape[..], &[width]].concat(), Kind::Float);
            let (labels, weights) = (labels(&shape, words), Tensor::rand(&*shape, (Kind::Float, Device::Cpu)));
            for own in WAYS {
                for weights in [None, Some(&weights)] {
                    let [a, b] = [Kind::Float, Kind::Double]
                        .map(|kind| states.to_dtype(kind, false, true).set_requires_grad(true));
                    let loss = own.sum(&a, &head, &labels, weights).unwrap();
                    let each = expected(&own, &b.matmul(&weight.to_kind(Kind::Double).tr()), &labels);
                    let other =
                        weights.map_or_else(|| each.shallow_clone(), |by| &each * by.view([-1])).sum(Kind::Float);
                    (&loss * 0.7).backward();
                    (&other * 0.7).backward();
                    let error = apart(&loss.detach(), &other.detach());
                    assert!(error < 1e-6, "{own:?} {shape:?}: {error}");
                    let error = apart(&a.grad(), &b.grad());
                    assert!(error < 1e-5, "{own:?} {shape:?}: {error}");
                }
                let [a, b] =
                    [Kind::Float, Kind::Double].map(|kind| states.to_dtype(kind, false, true).set_requires_grad(true));
                let found = own.of_tokens(&a, &head, &labels).unwrap();
                let each = expected(&own, &b.matmul(&weight.to_kind(Kind::Double).tr()), &labels).view_as(&labels);
                assert!(apart(&found.detach(), &each.detach()) < 1e-5);
                assert!(found.masked_select(&labels.lt(0)).abs().sum(Kind::Float).double_value(&[]) == 0.0);
                // Each token's loss counts otherwise.
                (&found * &weights).sum(Kind::Float).backward();
                (&each * &weights).sum(Kind::Float).backward();
                assert!(apart(&a.grad(), &b.grad()) < 1e-5, "{own:?} {shape:?}");
            }
        }
    }

    /// Against f32 on the same rounded numbers: logits and gradients are rounded to the type once each.
    #[test]
    fn half_precision_is_close_to_single() {
        crate::seed(12);
        for (kind, tolerance) in [(Kind::BFloat16, 2e-2), (Kind::Half, 3e-3)] {
            let weight = random(&[50, 16], kind);
            let states = random(&[9, 16], kind);
            let labels = labels(&[9], 50);
            for own in WAYS {
                let a = states.copy().set_requires_grad(true);
                let b = states.to_kind(Kind::Float).set_requires_grad(true);
                let loss = own.sum(&a, &FrozenWeight::plain(weight.shallow_clone()), &labels, None).unwrap();
                let other = expected(&own, &b.matmul(&weight.to_kind(Kind::Float).tr()), &labels).sum(Kind::Float);
                (&loss * 1000.0).backward();
                (&other * 1000.0).backward();
                assert_eq!((loss.kind(), a.grad().kind()), (Kind::Float, kind));
                assert!(apart(&loss.detach(), &other.detach()) < tolerance, "{own:?} {kind:?}");
                assert!(apart(&a.grad(), &b.grad()) < tolerance, "{own:?} {kind:?}");
            }
        }
    }

    /// The second head is larger than what is made whole at once: in two parts, its sums in another order.
    #[test]
    fn a_head_in_few_bytes_gives_what_it_gives_whole() {
        crate::seed(13);
        for (words, width, storages) in
            [(96, 64, &[Storage::Int8, Storage::Nf4, Storage::BFloat16][..]), (16_400, 2_048, &[Storage::Int8][..])]
        {
            let weight = random(&[words, width], Kind::Float) * 0.02;
            let (states, labels) = (random(&[5, width], Kind::Float), labels(&[5], words));
            for &storage in storages {
                let head = FrozenWeight::stored(&weight, storage).unwrap();
                let whole = FrozenWeight::plain(head.whole().unwrap());
                let run = |head: &FrozenWeight| {
                    let leaf = states.copy().set_requires_grad(true);
                    let loss = CrossEntropy::default().sum(&leaf, head, &labels, None).unwrap();
                    loss.backward();
                    (loss.detach(), leaf.grad())
                };
                let (own, other) = (run(&head), run(&whole));
                let errors = [apart(&own.0, &other.0), apart(&own.1, &other.1)];
                assert!(errors[0] < 1e-6 && errors[1] < 1e-5, "{storage} {words}: {errors:?}");
            }
        }
    }

    #[test]
    fn without_gradients_none_are_made_and_a_second_backward_pass_is_refused() {
        let head = FrozenWeight::plain(random(&[10, 4], Kind::Float));
        let (states, labels) = (random(&[3, 4], Kind::Float), Tensor::from_slice(&[1i64, -100, 9]));
        assert!(!CrossEntropy::default().sum(&states, &head, &labels, None).unwrap().requires_grad());
        // What does not count may be anything.
        let _ = states.get(1).fill_(f64::NAN);
        let loss = CrossEntropy::default().sum(&states, &head, &labels, None).unwrap();
        assert!(loss.double_value(&[]).is_finite());
        let leaf = states.set_requires_grad(true);
        let loss = CrossEntropy::default().sum(&leaf, &head, &labels, None).unwrap();
        let again = |keep| Tensor::f_run_backward(&[&loss], &[&leaf], keep, false);
        assert!(again(true).is_ok() && again(false).is_err());
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let head = FrozenWeight::plain(random(&[10, 4], Kind::Float));
        let (states, labels) = (random(&[3, 4], Kind::Float), Tensor::from_slice(&[1i64, -100, 9]));
        let own = CrossEntropy::default();
        let refused = |own: CrossEntropy, states: &Tensor, labels: &Tensor, weights: Option<&Tensor>| {
            own.sum(states, &head, labels, weights).unwrap_err().to_string()
        };
        assert!(refused(own, &random(&[3, 5], Kind::Float), &labels, None).contains("[3, 5]"));
        assert!(refused(own, &states, &labels.narrow(0, 0, 2), None).contains("labels"));
        assert!(refused(own, &states, &labels.to_kind(Kind::Int), None).contains("whole numbers"));
        assert!(refused(own, &states, &labels, Some(&random(&[2], Kind::Float))).contains("weights"));
        assert!(refused(own, &states, &(&labels + 1), None).contains("out of bounds"));
        assert!(refused(CrossEntropy { label_smoothing: 1.0, ..own }, &states, &labels, None).contains("smoothing"));
        assert!(refused(CrossEntropy { soft_cap: Some(-1.0), ..own }, &states, &labels, None).contains("cap"));
        assert!(own.of_tokens(&states, &head, &labels.narrow(0, 0, 2)).is_err());
    }
}
