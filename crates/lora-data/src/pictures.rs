//! Several datasets as one: every item with its dataset's settings, from the file to the sample that training sees.
//! A dataset's settings are in `settings`, what a run says of all of them is in `describe`.

mod describe;
mod settings;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use lora_core::random::Stream;
use lora_io::hash::sha256;
use lora_io::metadata::TrainingRecord;

use crate::cache::DiskCache;
use crate::caption::{CaptionOptions, Done};
use crate::crop::CropPlan;
use crate::dataset::{CaptionSource, ImageDataset, Item, Role, Stored, balance};
use crate::finding::{Finding, FindingKind, Severity};
use crate::picture::{self, decode_bytes};
use crate::processor::{ProcessContext, ProcessorRegistry};
use crate::sample::{Mask, Sample};
use crate::sampler::{Visit, Visits};
use crate::source::{Example, HeldOut, Identity, Overview, Shape, Source};
use crate::{Error, Result, RgbPicture};

use settings::Dataset;
pub use settings::{DatasetOptions, MaskOptions};

/// All pictures of a run.
#[derive(Debug)]
pub struct Pictures {
    datasets: Vec<Dataset>,
    items: Vec<Item>,
    /// The dataset of each item.
    of: Vec<usize>,
    findings: Vec<Finding>,
    /// The pictures are black and in no file.
    stand_ins: bool,
}

impl Pictures {
    /// How the name begins of what [`Source::identity`] says of the files' contents. States that were saved before it
    /// was said are without it.
    pub const LENGTHS: &str = "files of pictures and masks";

    /// Scans the datasets. Pictures too small for any bucket count as unreadable.
    ///
    /// # Errors
    /// As of [`ImageDataset::scan`], of all datasets at once; [`Error::Option`] for an unknown processor.
    pub fn open(options: Vec<DatasetOptions>, registry: &ProcessorRegistry) -> Result<Self> {
        let with_chain = |options: DatasetOptions| {
            let processors = registry.chain(&options.processors)?;
            Ok(Dataset { options, processors })
        };
        Self::scan(options.into_iter().map(with_chain).collect::<Result<_>>()?)
    }

    /// Pictures of no file, black and without captions: one a dataset, of the size and with as many visits as are
    /// given. What a run needs can be found with them before anybody has looked at the real ones.
    pub fn stand_ins(datasets: Vec<(DatasetOptions, usize)>) -> Self {
        let mut pictures =
            Self { datasets: Vec::new(), items: Vec::new(), of: Vec::new(), findings: Vec::new(), stand_ins: true };
        for (index, (options, visits)) in datasets.into_iter().enumerate() {
            pictures.items.push(Item {
                file: Stored::file("stand-in"),
                folder: "stand-ins".into(),
                caption: String::new(),
                more_lines: Vec::new(),
                caption_source: CaptionSource::None,
                size: options.framing.resolution(),
                repeats: visits,
                mask: None,
                role: Role::Training,
            });
            pictures.of.push(index);
            pictures.datasets.push(Dataset { options, processors: Vec::new() });
        }
        pictures
    }

    fn treated_alike(&self, path: PathBuf) -> Result<Self> {
        if self.stand_ins {
            return Ok(Self::stand_ins(self.datasets().take(1).map(|options| (options.clone(), 1)).collect()));
        }
        let Some(mut dataset) = self.datasets.first().map(Dataset::without_chance) else {
            return Self::scan(Vec::new());
        };
        dataset.options.path = path;
        dataset.options.scan.role = Role::Training;
        dataset.options.scan.metadata_file = None;
        let mut other = Self::scan(vec![dataset])?;
        // In the folder of masks a name stands for the picture that is trained on, not for another one of that name.
        let own = self.items.iter().filter_map(|item| Some((&item.mask.as_ref()?.path, &item.file.path)));
        let own: HashMap<&PathBuf, &PathBuf> = own.collect();
        for item in &mut other.items {
            let of = item.mask.as_ref().and_then(|mask| own.get(&mask.path));
            if of.is_some_and(|of| **of != item.file.path) {
                item.mask = None;
            }
        }
        Ok(other)
    }

    fn scan(datasets: Vec<Dataset>) -> Result<Self> {
        let mut pictures =
            Self { datasets: Vec::new(), items: Vec::new(), of: Vec::new(), findings: Vec::new(), stand_ins: false };
        let mut groups: Vec<(usize, Vec<(usize, Item)>)> = Vec::new();
        let mut refused = Vec::new();
        for dataset in datasets {
            let options = &dataset.options;
            let (items, mut findings) = match ImageDataset::scan(&options.path, &options.scan) {
                Ok(scanned) => scanned.into_parts(),
                Err(error) => {
                    refused.extend(error.into_captions()?);
                    continue;
                }
            };
            let place = pictures.datasets.len();
            let mut kept = Vec::with_capacity(items.len());
            for item in items {
                match options.framing.plan(item.size) {
                    Some(_) => kept.push((place, item)),
                    None if options.scan.strictness == crate::dataset::Strictness::Strict => {
                        return Err(too_small(&item));
                    }
                    None => {
                        let reason = too_small(&item).reason();
                        findings.push(Finding::new(item.file.path, FindingKind::TooSmall, reason));
                    }
                }
            }
            pictures.findings.extend(findings);
            match groups.iter_mut().find(|(group, _)| *group == options.group) {
                Some((_, own)) => own.extend(kept),
                None => groups.push((options.group, kept)),
            }
            pictures.datasets.push(dataset);
        }
        if !refused.is_empty() {
            return Err(Error::captions(refused));
        }
        for (_, own) in groups {
            let (mut places, mut items): (Vec<usize>, Vec<Item>) = own.into_iter().unzip();
            if items.iter().any(|item| item.role == Role::Regularisation) {
                // Which are left is told by their paths: a file may stand in several datasets, but in each only once.
                let before: Vec<(usize, PathBuf)> =
                    places.iter().zip(&items).map(|(place, item)| (*place, item.file.path.clone())).collect();
                balance(&mut items);
                let mut left = items.iter().map(|item| &item.file.path).peekable();
                places = before
                    .into_iter()
                    .filter(|(_, path)| left.peek().is_some_and(|next| *next == path) && left.next().is_some())
                    .map(|(place, _)| place)
                    .collect();
            }
            pictures.of.extend(places);
            pictures.items.extend(items);
        }
        Ok(pictures)
    }

    /// The items, dataset by dataset.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Each picture with how its caption is treated.
    pub(crate) fn with_captions(&self) -> impl Iterator<Item = (&Item, &CaptionOptions)> {
        self.items.iter().zip(&self.of).map(|(item, &of)| (item, &self.datasets[of].options.captions))
    }

    /// Findings that cost a picture or a caption.
    pub fn lost(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.kind.severity() == Severity::Lost)
    }

    /// The settings of the datasets.
    pub fn datasets(&self) -> impl Iterator<Item = &DatasetOptions> {
        self.datasets.iter().map(|dataset| &dataset.options)
    }

    /// The settings of an item's dataset.
    pub fn options(&self, index: usize) -> &DatasetOptions {
        &self.datasets[self.of[index]].options
    }

    /// The number of an item's dataset.
    pub(crate) fn dataset_of(&self, index: usize) -> usize {
        self.of[index]
    }

    /// How an item is scaled and cut from the middle.
    pub fn plan(&self, index: usize) -> CropPlan {
        let item = &self.items[index];
        // Those without a plan were left out when the datasets were opened.
        self.options(index).framing.plan(item.size).unwrap_or_else(|| CropPlan::center(item.size, item.size))
    }

    /// What training sees of an item: decoded and processed to the size of its bucket. `random` belongs to the visit.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Picture`] where it cannot be read, and what a processor gives.
    pub fn load(&self, index: usize, random: &Stream) -> Result<Sample> {
        self.load_as(index, None, random)
    }

    fn load_as(&self, index: usize, variation: Option<usize>, random: &Stream) -> Result<Sample> {
        if self.stand_ins {
            return black(self.plan(index).target);
        }
        let sample = self.decode_at(index, &self.items[index].file.read()?, self.enough(index))?;
        self.process_as(index, sample, variation, random)
    }

    /// The least sides that do for an item, where its first processor lets it be decoded at a fraction of its size:
    /// half as large again as after scaling, so that the resampling that follows still decides what it looks like.
    fn enough(&self, index: usize) -> Option<(usize, usize)> {
        let first = self.datasets[self.of[index]].processors.first()?;
        let (width, height) = self.plan(index).resized;
        first.accepts_reduced().then_some((width * 3 / 2, height * 3 / 2))
    }

    /// An item decoded from its bytes, with its mask, at its full size.
    ///
    /// # Errors
    /// [`Error::Picture`] where they are no whole picture; [`Error::Io`] where the mask cannot be read.
    pub fn decode(&self, index: usize, bytes: &[u8]) -> Result<Sample> {
        self.decode_at(index, bytes, None)
    }

    fn decode_at(&self, index: usize, bytes: &[u8], enough: Option<(usize, usize)>) -> Result<Sample> {
        let (item, options) = (&self.items[index], self.options(index));
        let decoded = decode_bytes(&item.file.path, bytes, options.background, enough)?;
        let masks = &options.masks;
        let mask = match &item.mask {
            _ if !masks.enabled => None,
            Some(mask) => Some(mask_of(&decode_bytes(&mask.path, &mask.read()?, [0; 3], None)?.picture, masks)?),
            None if masks.alpha => decoded.alpha.map(|alpha| weighted(&alpha, masks)).transpose()?,
            None => None,
        };
        // At its full size a picture is what its pixels say, whatever its header said.
        let source = match enough {
            Some(_) => item.size,
            None => (decoded.picture.width(), decoded.picture.height()),
        };
        Sample::of_source(decoded.picture, mask, source)
    }

    /// The processors of an item's dataset.
    ///
    /// # Errors
    /// What a processor gives; [`Error::Option`] where the last one leaves another size than the bucket's.
    pub fn process(&self, index: usize, sample: Sample, random: &Stream) -> Result<Sample> {
        self.process_as(index, sample, None, random)
    }

    fn process_as(
        &self,
        index: usize,
        mut sample: Sample,
        mut variation: Option<usize>,
        random: &Stream,
    ) -> Result<Sample> {
        let dataset = &self.datasets[self.of[index]];
        let source = sample.size();
        let plan = self.plan(index);
        let target = plan.target;
        for (number, (processor, name)) in dataset.processors.iter().zip(&dataset.options.processors).enumerate() {
            let random = random.at("processor").with(number as u64);
            let context = ProcessContext { source, plan, random, variation };
            sample = processor.process(sample, &context)?;
            sample.check(name)?;
            // As the digits of a number, so that all combinations come.
            variation = variation.map(|variation| variation / processor.outcomes().unwrap_or(1).max(1));
        }
        if sample.size() != target {
            let (found, path) = (sample.size(), &self.items[index].file.path);
            return Err(Error::Option {
                key: "processors",
                value: path.display().to_string(),
                reason: format!(
                    "the last processor left {}×{} pixels, expected {}×{}",
                    found.0, found.1, target.0, target.1
                ),
            });
        }
        Ok(sample)
    }

    /// Everything besides the file's bytes that an item's sample depends on.
    fn settings(&self, index: usize, variation: Option<usize>, random: &Stream) -> String {
        let dataset = &self.datasets[self.of[index]];
        let processors: Vec<String> = dataset.processors.iter().map(|processor| processor.settings()).collect();
        let by_turns = variation.is_some() && dataset.outcomes_are_known();
        let random = (dataset.is_random() && !by_turns).then(|| random.key());
        let DatasetOptions { background, masks, .. } = &dataset.options;
        // Older versions kept what they made of JPEGs that are cut short, which are refused now.
        let jpeg = crate::dataset::has_extension(&self.items[index].file.path, &["jpg", "jpeg"]);
        let whole = if jpeg { " whole" } else { "" };
        let variation = variation.map(|variation| format!(" variation {variation}")).unwrap_or_default();
        format!("{processors:?} {:?} {background:?} {masks:?} {random:?}{whole}{variation}", self.plan(index))
    }

    /// A digest of what the pictures are called, how large they are, what is written beside them and how often they
    /// come.
    fn digest(&self) -> String {
        let mut text = String::new();
        for (index, item) in self.items.iter().enumerate() {
            let name = item.file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let (size, repeats, dataset) = (item.size, item.repeats, self.of[index]);
            let plan = self.plan(index);
            text.push_str(&format!("{name} {size:?} {repeats} {dataset} {:?} {plan:?}\n", item.lines()));
        }
        sha256(text.as_bytes())[..16].to_owned()
    }

    /// A digest of how long the files of pictures and of the masks in use are: another picture of the same name and
    /// size is seldom as long, and to read all of them before each run would take too long.
    fn lengths(&self) -> String {
        let mut text = String::new();
        for (index, item) in self.items.iter().enumerate() {
            let mask = item.mask.as_ref().filter(|_| self.options(index).masks.enabled);
            text.push_str(&format!("{:?} {:?}\n", item.file.length(), mask.map(Stored::length)));
        }
        sha256(text.as_bytes())[..16].to_owned()
    }
}

impl Source for Pictures {
    fn count(&self) -> usize {
        self.items.len()
    }

    fn visits(&self, item: usize) -> Visits {
        let (width, height) = self.plan(item).target;
        Visits {
            count: self.items[item].repeats,
            shape: Shape::Picture(width, height),
            batch_size: self.options(item).batch_size,
        }
    }

    fn path(&self, item: usize) -> &Path {
        &self.items[item].file.path
    }

    fn example(&self, item: usize, draw: &Stream) -> Result<Example> {
        self.load(item, draw).map(Example::Picture)
    }

    fn is_random(&self) -> bool {
        self.datasets.iter().any(Dataset::is_random)
    }

    fn variations(&self, item: usize) -> usize {
        self.datasets[self.of[item]].variations()
    }

    fn variations_are_all(&self) -> bool {
        self.datasets.iter().all(Dataset::variations_are_all)
    }

    fn variation(&self, item: usize, variation: usize, draw: &Stream) -> Result<Example> {
        self.load_as(item, Some(variation), draw).map(Example::Picture)
    }

    fn caption(&self, visit: &Visit, draw: &Stream) -> String {
        self.caption_when(visit, Done::ALL, draw)
    }

    fn caption_when(&self, visit: &Visit, done: Done, draw: &Stream) -> String {
        self.options(visit.index).captions.process(&self.items[visit.index].lines(), visit.epoch, done, draw)
    }

    fn plain_caption(&self, item: usize) -> String {
        self.options(item).captions.kept(&self.items[item].lines(), Done::ALL, &Stream::new(0))
    }

    fn captions_are_fixed(&self) -> bool {
        self.datasets.iter().all(|dataset| dataset.options.captions.is_fixed())
    }

    fn loss_weight(&self, item: usize) -> f64 {
        self.options(item).loss_weight
    }

    fn key_parts(
        &self,
        item: usize,
        variation: Option<usize>,
        draw: &Stream,
        cache: &DiskCache,
    ) -> Result<Vec<String>> {
        let Item { file, mask, .. } = &self.items[item];
        let mask = mask.as_ref().map(|mask| cache.content(mask)).transpose()?.unwrap_or_default();
        Ok(vec![cache.content(file)?, mask, self.settings(item, variation, draw)])
    }

    fn identity(&self) -> Identity {
        let mut options = Vec::new();
        for (number, own) in self.datasets.iter().enumerate() {
            let dataset = &own.options;
            let mut add = |name: &str, value: String| match number {
                0 => options.push((name.to_owned(), value)),
                _ => options.push((format!("{name} (dataset {})", number + 1), value)),
            };
            add("enable_bucket and bucket sizes", format!("{:?}", dataset.framing));
            // States that were saved before several were kept say nothing of one.
            let variations = match own.variations() {
                1 => String::new(),
                several => format!(", image_variations = {several}"),
            };
            add("processors", format!("{:?}{variations}", dataset.processors));
            add("captions", format!("{:?}", dataset.captions));
            add("background", format!("{:?}", dataset.background));
            add("batch_size of the dataset", format!("{:?}", dataset.batch_size));
            add("loss_weight", format!("{:?}", dataset.loss_weight));
            add("masks", format!("{:?}", dataset.masks));
        }
        let (count, visits) = (self.items.len(), self.items.iter().map(|item| item.repeats).sum::<usize>());
        let items = vec![
            ("dataset".into(), format!("{count} pictures, {visits} visits an epoch")),
            ("pictures and their captions".into(), self.digest()),
            (Self::LENGTHS.into(), self.lengths()),
        ];
        Identity { options, items }
    }

    fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Treated as the first dataset's are.
    fn of_another(&self, path: &Path) -> Result<Box<dyn Source>> {
        self.treated_alike(path.into()).map(|pictures| Box::new(pictures) as Box<dyn Source>)
    }

    /// Of regularisation pictures none is held out.
    fn hold_out(&mut self, held_out: HeldOut, seed: u64) -> Result<Box<dyn Source>> {
        let own: Vec<usize> = (0..self.items.len()).filter(|&item| self.items[item].role == Role::Training).collect();
        let chosen: BTreeSet<usize> = held_out.choose(own.len(), seed)?.into_iter().map(|place| own[place]).collect();
        let mut other = Self {
            datasets: self.datasets.iter().map(Dataset::without_chance).collect(),
            items: Vec::with_capacity(chosen.len()),
            of: Vec::with_capacity(chosen.len()),
            findings: Vec::new(),
            stand_ins: self.stand_ins,
        };
        let all = std::mem::take(&mut self.items).into_iter().zip(std::mem::take(&mut self.of));
        for (index, (item, dataset)) in all.enumerate() {
            match chosen.contains(&index) {
                true => {
                    other.items.push(Item { repeats: 1, ..item });
                    other.of.push(dataset);
                }
                false => {
                    self.items.push(item);
                    self.of.push(dataset);
                }
            }
        }
        Ok(Box::new(other))
    }

    fn overview(&self) -> Overview {
        describe::overview(self)
    }

    fn record(&self, record: &mut TrainingRecord) {
        describe::record(self, record);
    }

    fn leave_out(&mut self, unusable: Vec<(usize, Error)>) {
        let mut kept = vec![true; self.items.len()];
        for (item, error) in unusable {
            kept[item] = false;
            // A mask that is damaged is a file of its own; without it its picture would count in full.
            let own = self.path(item);
            let (path, reason) = match error.path() {
                Some(path) if path != own => {
                    (path, format!("{}; {} is left out with it", error.reason(), own.display()))
                }
                _ => (own, error.reason()),
            };
            self.findings.push(Finding::new(path, FindingKind::Unreadable, reason));
        }
        let mut keep = kept.iter();
        self.items.retain(|_| keep.next().is_none_or(|&keep| keep));
        let mut keep = kept.iter();
        self.of.retain(|_| keep.next().is_none_or(|&keep| keep));
    }
}

/// Sides that no picture has.
const LONGEST_SIDE: usize = 1 << 15;

/// A picture of a size that nobody has seen yet.
fn black((width, height): (usize, usize)) -> Result<Sample> {
    let picture = match width.max(height) {
        0..=LONGEST_SIDE => RgbPicture::new(width, height, vec![0; 3 * width * height]),
        _ => None,
    };
    let picture = picture.ok_or_else(|| Error::Option {
        key: "max_resolution",
        value: format!("{width},{height}"),
        reason: format!("expected sides of 1 to {LONGEST_SIDE} pixels"),
    })?;
    Sample::new(picture, None)
}

fn too_small(item: &Item) -> Error {
    let reason = format!(
        "{}×{} pixels are less than a bucket's step, and bucket_no_upscale forbids to enlarge them",
        item.size.0, item.size.1
    );
    picture_error(item, reason)
}

fn picture_error(item: &Item, reason: String) -> Error {
    Error::Picture { path: item.file.path.clone(), reason }
}

/// The red channel of a mask picture, as sd-scripts takes it.
fn mask_of(picture: &picture::RgbPicture, options: &MaskOptions) -> Result<Mask> {
    let data = picture.data().iter().step_by(3).copied().collect();
    match Mask::new(picture.width(), picture.height(), data) {
        Some(mask) => weighted(&mask, options),
        None => {
            Err(Error::Option { key: "mask_dir", value: format!("{picture:?}"), reason: "it has no pixels".into() })
        }
    }
}

fn weighted(mask: &Mask, options: &MaskOptions) -> Result<Mask> {
    let least = (255.0 * options.unmasked_weight).round() as u8;
    let weight = |&value: &u8| if options.inverted { 255 - value } else { value }.max(least);
    let data = mask.data().iter().map(weight).collect();
    Mask::new(mask.width(), mask.height(), data).ok_or_else(|| Error::Option {
        key: "masked_loss",
        value: format!("{mask:?}"),
        reason: "it has no pixels".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::Framing;

    /// Decoding at a fraction must not cost quality: against the picture before it was compressed, what training gets
    /// is as good as by way of the full size, to within a decibel far beyond what can be seen.
    #[test]
    fn reduced_decoding_is_as_good() {
        let folder = tempfile::tempdir().unwrap();
        let (width, height) = (1211, 905);
        let mut grain = Stream::new(3);
        let picture = image::RgbImage::from_fn(width, height, |x, y| {
            let (x, y) = (x as f32, y as f32);
            let wave = |a: f32, b: f32| 45.0 * (x / a + y / b).sin() + 25.0 * (x / (a / 7.0) - y / (b / 5.0)).cos();
            let noise = (grain.next_u32() % 13) as f32 - 6.0;
            // Edges too: a grid of discs.
            let disc = if (x % 130.0 - 65.0).hypot(y % 130.0 - 65.0) < 40.0 { 50.0 } else { 0.0 };
            image::Rgb(
                [wave(31.0, 47.0), wave(53.0, -29.0), wave(71.0, 37.0)].map(|own| (110.0 + own + disc + noise) as u8),
            )
        });
        picture.save(folder.path().join("b.png")).unwrap();
        let file = std::fs::File::create(folder.path().join("a.jpg")).unwrap();
        picture.write_with_encoder(image::codecs::jpeg::JpegEncoder::new_with_quality(file, 85)).unwrap();

        let framing = Framing::Fixed((256, 256));
        let options = DatasetOptions { framing, ..DatasetOptions::of(folder.path()) };
        let pictures = Pictures::open(vec![options], &ProcessorRegistry::default()).unwrap();
        let random = Stream::new(0);
        let bytes = |index: usize| pictures.items()[index].file.read().unwrap();
        let truth = pictures.process(1, pictures.decode(1, &bytes(1)).unwrap(), &random).unwrap();
        let full = pictures.process(0, pictures.decode(0, &bytes(0)).unwrap(), &random).unwrap();
        let reduced = pictures.decode_at(0, &bytes(0), pictures.enough(0)).unwrap();
        assert_eq!((reduced.size(), reduced.frame.source), ((606, 453), (1211, 905)));
        let reduced = pictures.process(0, reduced, &random).unwrap();
        assert_eq!(reduced, pictures.load(0, &random).unwrap());
        let psnr = |sample: &Sample| {
            let pairs = sample.picture.data().iter().zip(truth.picture.data());
            let squares: f64 = pairs.map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
            10.0 * (255.0f64.powi(2) * truth.picture.data().len() as f64 / squares).log10()
        };
        let (full, reduced) = (psnr(&full), psnr(&reduced));
        assert!(reduced > full - 1.0 && reduced > 45.0, "{reduced:.2} dB at a half, {full:.2} dB in full");
    }

    #[test]
    fn variations_are_all_there_are_or_as_many_as_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let picture = image::RgbImage::from_fn(96, 64, |x, y| image::Rgb([x as u8, y as u8, 0]));
        picture.save(folder.path().join("a.png")).unwrap();
        let of = |processors: &[&str], variations| {
            let processors = processors.iter().map(|&name| name.to_owned()).collect();
            let framing = Framing::Fixed((64, 64));
            let options = DatasetOptions { processors, variations, framing, ..DatasetOptions::of(folder.path()) };
            Pictures::open(vec![options], &ProcessorRegistry::default()).unwrap()
        };
        let counts = |processors: &[&str], variations| {
            let pictures = of(processors, variations);
            (pictures.variations(0), pictures.variations_are_all())
        };
        assert_eq!(counts(&["center_crop"], None), (1, true));
        assert_eq!(counts(&["center_crop"], Some(5)), (1, true));
        assert_eq!(counts(&["center_crop", "flip"], None), (2, true));
        assert_eq!(counts(&["center_crop", "flip"], Some(1)), (1, false));
        assert_eq!(counts(&["center_crop", "flip"], Some(5)), (2, true));
        assert_eq!(counts(&["center_crop", "flip", "flip"], None), (4, true));
        assert_eq!(counts(&["random_crop"], None), (1, false));
        assert_eq!(counts(&["random_crop", "flip"], None), (2, false));
        assert_eq!(counts(&["random_crop", "flip"], Some(6)), (6, false));

        let pictures = of(&["center_crop", "flip"], None);
        let sample = |variation: usize, seed: u64| match pictures.variation(0, variation, &Stream::new(seed)).unwrap() {
            Example::Picture(sample) => sample,
            other => panic!("{other:?}"),
        };
        let plain = of(&["center_crop"], None).load(0, &Stream::new(0)).unwrap();
        for seed in 0..8 {
            assert_eq!((sample(0, seed), sample(1, seed)), (plain.clone(), plain.clone().mirror()));
        }
        // All combinations of several processors come.
        let twice = of(&["center_crop", "flip", "flip"], None);
        let seen = [0, 1, 2, 3].map(|own| twice.variation(0, own, &Stream::new(0)).unwrap());
        let mirrored = seen.map(|own| matches!(own, Example::Picture(sample) if sample != plain));
        assert_eq!(mirrored, [false, true, true, false]);
        let cache = DiskCache::open(folder.path().join("cache")).unwrap();
        let key = |variation, seed| pictures.key_parts(0, variation, &Stream::new(seed), &cache).unwrap();
        assert!(key(Some(0), 0) != key(Some(1), 0) && key(Some(0), 0) != key(None, 0));
        assert!(key(Some(1), 0) == key(Some(1), 1) && key(None, 0) != key(None, 1));
    }
}
