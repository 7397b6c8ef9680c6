//! Taggers: an ONNX model that gives a probability for each tag of the list beside it. Which tags become a caption is said in
//! [`crate::choose`].

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use lora_data::RgbPicture;
use ort::ep::ExecutionProvider;
use ort::session::Session;
use ort::value::{Tensor, TensorElementType, ValueType};
use serde::Deserialize;

use crate::input::{Layout, Preprocessing};
use crate::tags::{LIST, TagList};
use crate::{Error, Result, runtime};

/// The side of the published taggers, for models that take any.
const USUAL_SIDE: usize = 448;
/// The largest side that a model may ask for.
const MAX_SIDE: i64 = 4096;

/// Where a tagger computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// On a GPU where ONNX Runtime can, on the CPU otherwise.
    #[default]
    Auto,
    /// On the CPU.
    Cpu,
    /// On an NVIDIA GPU; where ONNX Runtime cannot, that is an error.
    Cuda,
}

/// A tagger, ready to look at pictures. Threads may share it; one picture is looked at at a time, on all cores.
#[derive(Debug)]
pub struct Tagger {
    path: PathBuf,
    session: Mutex<Session>,
    tags: TagList,
    preprocessing: Preprocessing,
    side: usize,
    layout: Layout,
    /// Number of the output that has a value a tag.
    output: usize,
    on_gpu: bool,
}

impl Tagger {
    /// Opens a model, or the one in a folder, with the `selected_tags.csv` beside it, prepared as WD taggers are.
    ///
    /// # Errors
    /// [`Error::Runtime`] without ONNX Runtime, [`Error::TagList`] without a list, [`Error::Tagger`] where the model cannot be
    /// read, takes something else than one picture, or has not one output a tag.
    pub fn open(path: &Path, device: Device) -> Result<Self> {
        Self::open_with(path, device, Preprocessing::default())
    }

    /// As [`Tagger::open`], for models that were trained on other numbers.
    ///
    /// # Errors
    /// As [`Tagger::open`].
    pub fn open_with(path: &Path, device: Device, preprocessing: Preprocessing) -> Result<Self> {
        let path = model_in(path)?;
        let tags = TagList::read(&path.with_file_name(LIST))?;
        runtime::onnx_runtime()?;
        let refused = |reason: String| Error::Tagger { path: path.clone(), reason };
        let (session, on_gpu) = session(&path, device).map_err(refused)?;
        let (side, layout) = input(&session).map_err(refused)?;
        let output = output(&session, tags.0.len()).map_err(refused)?;
        Ok(Self { path, session: Mutex::new(session), tags, preprocessing, side, layout, output, on_gpu })
    }

    /// The model's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tags that it knows, in the order of its outputs.
    pub fn tags(&self) -> &TagList {
        &self.tags
    }

    /// Side of the squares that it looks at, in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Whether it computes on a GPU.
    pub fn on_gpu(&self) -> bool {
        self.on_gpu
    }

    /// What it says of a picture: a probability from 0 to 1 for each of [`Tagger::tags`]. The picture's transparency must lie
    /// over white.
    ///
    /// # Errors
    /// [`Error::Tagger`] where the model fails, or gives something else than probabilities.
    pub fn outputs(&self, picture: &RgbPicture) -> Result<Vec<f32>> {
        let refused = |reason: String| Error::Tagger { path: self.path.clone(), reason };
        let numbers = self.preprocessing.numbers(picture, self.side, self.layout);
        let numbers = numbers.ok_or_else(|| refused("a picture could not be scaled".into()))?;
        let shape = match self.layout {
            Layout::Last => [1, self.side, self.side, 3],
            Layout::First => [1, 3, self.side, self.side],
        };
        let input = Tensor::from_array((shape, numbers)).map_err(|error| refused(error.to_string()))?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let outputs = session.run(ort::inputs![input]).map_err(|error| refused(error.to_string()))?;
        let (shape, values) =
            outputs[self.output].try_extract_tensor::<f32>().map_err(|error| refused(error.to_string()))?;
        if values.len() != self.tags.0.len() {
            return Err(refused(different(values.len(), self.tags.0.len()) + &format!(" (output of shape {shape})")));
        }
        match values.iter().find(|value| !(-1e-3..=1.001).contains(*value)) {
            Some(value) => Err(refused(format!(
                "it gives {value} where a probability from 0 to 1 is expected; taggers of this kind end with a sigmoid"
            ))),
            None => Ok(values.to_vec()),
        }
    }
}

/// The model that a path means: itself, or `model.onnx` or the only `.onnx` of a folder.
fn model_in(path: &Path) -> Result<PathBuf> {
    let refused = |reason: String| Error::Tagger { path: path.to_owned(), reason };
    if path.is_file() {
        return Ok(path.to_owned());
    }
    let usual = path.join("model.onnx");
    if usual.is_file() {
        return Ok(usual);
    }
    let entries = std::fs::read_dir(path).map_err(|error| refused(format!("cannot open it: {error}")))?;
    let is_model = |path: &PathBuf| path.extension().is_some_and(|own| own.eq_ignore_ascii_case("onnx"));
    let mut models: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_model).collect();
    match (models.pop(), models.len()) {
        (Some(model), 0) => Ok(model),
        (None, _) => Err(refused("there is no .onnx file in it".into())),
        (Some(_), others) => Err(refused(format!("there are {} .onnx files in it; give one of them", others + 1))),
    }
}

/// Opens the model, and says whether it computes on a GPU.
fn session(path: &Path, device: Device) -> Result<(Session, bool), String> {
    let builder = || {
        let builder = Session::builder().map_err(|error| error.to_string())?;
        // What fails is told by an error already.
        builder.with_log_level(ort::logging::LogLevel::Fatal).map_err(|error| error.to_string())
    };
    let cuda = ort::ep::CUDA::default();
    let has_cuda = cuda.is_available().unwrap_or(false);
    if device == Device::Cuda && !has_cuda {
        return Err(
            "device = \"cuda\", but this ONNX Runtime computes on the CPU only; set ORT_DYLIB_PATH to one built for \
                    CUDA (Python's onnxruntime-gpu has it)"
                .into(),
        );
    }
    if device != Device::Cpu && has_cuda {
        let on_gpu = builder()?
            .with_execution_providers([cuda.build().error_on_failure()])
            .map_err(|error| error.to_string())
            .and_then(|mut builder| builder.commit_from_file(path).map_err(|error| error.to_string()));
        match on_gpu {
            Ok(session) => return Ok((session, true)),
            Err(reason) if device == Device::Cuda => return Err(format!("it cannot be opened on the GPU: {reason}")),
            // Without a driver or CUDA's libraries the CPU serves.
            Err(_) => {}
        }
    }
    builder()?.commit_from_file(path).map(|session| (session, false)).map_err(|error| error.to_string())
}

/// Side and layout of the only input.
fn input(session: &Session) -> Result<(usize, Layout), String> {
    let [input] = session.inputs() else {
        return Err(format!("it takes {} inputs; a tagger takes one picture", session.inputs().len()));
    };
    let ValueType::Tensor { ty, shape, .. } = input.dtype() else {
        return Err(format!("its input `{}` is no tensor", input.name()));
    };
    let expected = "expected fp32 pictures [batch, side, side, 3] or [batch, 3, side, side]";
    let found = format!("its input `{}` is {ty:?} {shape}; {expected}", input.name());
    if *ty != TensorElementType::Float32 {
        return Err(found);
    }
    let (batch, sides, layout) = match &shape[..] {
        [batch, height, width, 3] => (*batch, [*height, *width], Layout::Last),
        [batch, 3, height, width] => (*batch, [*height, *width], Layout::First),
        _ => return Err(found),
    };
    let side = match sides {
        [-1, -1] => USUAL_SIDE as i64,
        [height, width] if height == width || width == -1 => height,
        [-1, width] => width,
        _ => return Err(found),
    };
    match (batch, side) {
        (-1 | 1, 1..=MAX_SIDE) => Ok((side as usize, layout)),
        _ => Err(found),
    }
}

/// Number of the output that has a value for each of so many tags.
fn output(session: &Session, tags: usize) -> Result<usize, String> {
    let last = |index: usize| match session.outputs()[index].dtype() {
        ValueType::Tensor { ty: TensorElementType::Float32, shape, .. } => shape.last().copied(),
        _ => None,
    };
    let all = 0..session.outputs().len();
    if let Some(index) = all.clone().find(|&index| last(index) == i64::try_from(tags).ok()) {
        return Ok(index);
    }
    // What is not written down shows when it runs.
    if let Some(index) = all.clone().find(|&index| last(index) == Some(-1)) {
        return Ok(index);
    }
    match all.filter_map(last).next() {
        Some(found) => Err(different(usize::try_from(found).unwrap_or(0), tags)),
        None => Err("it has no fp32 output".into()),
    }
}

fn different(outputs: usize, tags: usize) -> String {
    format!("it has {outputs} outputs, and `{LIST}` lists {tags} tags; the two files are not of one model")
}
