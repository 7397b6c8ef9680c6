//! The documentation's page, made from the tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::row::{self, Kind, Means, Row};
use crate::{Tool, tools};

/// Coming from another trainer, as Markdown: what becomes of each key.
pub fn page() -> String {
    let mut text = String::from(
        "# Coming from other trainers\n\n\
         ```sh\n\
         lora import run.toml --out config.toml     # sd-scripts, OneTrainer, ai-toolkit, axolotl, and others below\n\
         lora import train.sh                       # a script with an `accelerate launch … train_network.py …`\n\
         lora import -- accelerate launch train_network.py --network_dim 16 …\n\
         lora train run.toml                        # the same at once\n\
         ```\n\n\
         Whose file it is, its content says. Each key of it ends in one of four lists, which are printed (`--json` for programs):\n\
         taken, translated (with how), without effect on the result, **no counterpart** (with what is lost). What the other trainer\n\
         does where a key is not given is written into the configuration too, where it is not what this program does. A key that a\n\
         trainer is not known to have is refused with its line and the nearest known one; `--allow-unknown` lists it as having no\n\
         counterpart instead. Keys that contradict each other, and values that the other trainer would refuse, are errors.\n\n\
         Formulas are the same (README); random numbers are not, so that two runs with one seed draw other noise.\n\
         Paths stay as they are, relative to the current directory. A name on a hub is kept, and the list says that it has to be\n\
         fetched: a base is then found in the cache of Hugging Face's programs.\n\n\
         Tried on the configurations that the trainers themselves ship, each key accounted for. Of LLaMA-Factory and axolotl these\n\
         were the files of their source archives. Of the others keys and values were copied from the files of their repositories,\n\
         without prompts and notes. Those of kohya_ss and OneTrainer for Stable Diffusion 1.5, 2 and XL were then planned\n\
         (`lora plan`) on small bases: no value was refused but ranks beyond the layers of these, and an adapter's file that was\n\
         not there.\n\n\
         | trainer | configurations | what came out |\n|---|---|---|\n\
         | LLaMA-Factory 0.9.5 | its 29 examples of LoRA and OFT | 27 configurations; KTO and reward models are refused |\n\
         | axolotl 0.19.0 | its 192 examples of LoRA | 180 configurations; 9 of objectives that are not trained here and 3 with a key \
         that axolotl does not have are refused |\n\
         | kohya_ss | all 48 presets: 14 of Stable Diffusion 1.5, 31 of XL, 2 of 3, one of FLUX.1 | 48 configurations; no counterpart \
         have D-Adaptation (Prodigy stands in its place), PyTorch's CosineAnnealingLR, limits of norms and dropouts within LoHa, LoKr \
         and IA3, LyCORIS' trained norms, ranks read from a file, samples by epochs |\n\
         | OneTrainer | 24 presets: all 19 of Stable Diffusion 1.5, 2, XL and 3, and 5 of FLUX.1, Chroma, Qwen-Image, Z-Image, Anima | \
         16 configurations; 3 that train embeddings and 5 of inpainting bases are refused; no counterpart have the end of a text \
         encoder's training, masks that count at some steps, a loss by the masked area, which layers are quantised, and Chroma's \
         parabola over noise levels |\n\
         | ai-toolkit | 7 examples: FLUX.1 dev and schnell, Chroma, Qwen-Image, Stable Diffusion 3.5, Z-Image base and turbo | 7 \
         configurations; no counterpart have weights by noise level and an adapter for fewer bits |\n\
         | fluxgym | its command and dataset file for 12 GB | 1 configuration |\n\
         | musubi-tuner | commands and dataset file of its pages on Qwen-Image and Z-Image | 2 configurations |\n\
         | diffusion-pipe | its main example with its dataset file, for FLUX.1, Qwen-Image and SDXL | 3 configurations |\n\n\
         This page is made from the program's own tables (`crates/lora-import/src/tools`).\n",
    );
    for tool in Tool::ALL {
        let table = tools::table(tool);
        let _ = write!(text, "\n## {}\n\n", table.title);
        wrap(&mut text, table.about, "");
        let mut section = Section::default();
        // What a table shares with one before it stands there.
        row::rows(table.own).for_each(|row| section.add(row, ""));
        section.write(&mut text);
    }
    text
}

/// The keys of one trainer: those that are translated, each with a line, and the others by what is said of them.
#[derive(Default)]
struct Section {
    rows: String,
    same: Vec<String>,
    lost: BTreeMap<&'static str, Vec<String>>,
    nothing: BTreeMap<&'static str, Vec<String>>,
}

impl Section {
    fn add(&mut self, row: &'static Row, prefix: &str) {
        row.names().for_each(|name| self.add_key(row, name, prefix));
    }

    fn add_key(&mut self, row: &'static Row, key: &str, prefix: &str) {
        let name = format!("{prefix}{key}");
        let own = match &row.means {
            Means::Same(ours, _) if *ours == key && prefix.is_empty() && row.default.is_none() => {
                return self.same.push(name);
            }
            Means::Same(ours, _) if *ours == key => "the same".to_owned(),
            Means::Same(ours, Kind::Positive | Kind::AtLeastOne) => format!("`{ours}`, 0 is none"),
            Means::Same(ours, _) => format!("`{ours}`"),
            Means::By(ours, how, _) => match ours {
                [] => (*how).to_owned(),
                ours => {
                    let ours: Vec<_> = ours.iter().map(|ours| format!("`{ours}`")).collect();
                    format!("{}: {how}", ours.join(", "))
                }
            },
            Means::NoEffect(why) => return self.nothing.entry(why).or_default().push(name),
            Means::Lost(_, what) => return self.lost.entry(what).or_default().push(name),
            Means::Table(within) => return row::rows(within).for_each(|row| self.add(row, &format!("{name}."))),
            Means::Arguments(within) => return within.iter().for_each(|row| self.add(row, &format!("{name} "))),
            Means::Datasets(within, _) => return within.iter().for_each(|row| self.add(row, &format!("{name}[]."))),
        };
        let cell = |text: &str| text.replace('|', "\\|");
        let default = row.default.map_or_else(String::new, |json| format!("`{}`", cell(json)));
        let _ = writeln!(self.rows, "| `{name}` | {default} | {} |", cell(&own));
    }

    fn write(&self, text: &mut String) {
        let _ = write!(text, "\n| key | not given | here |\n|---|---|---|\n{}", self.rows);
        if !self.same.is_empty() {
            text.push('\n');
            wrap(text, &format!("The same here: {}.", listed(&self.same)), "");
        }
        for (heading, keys) in [("**No counterpart**", &self.lost), ("Without effect on the result", &self.nothing)] {
            let _ = write!(text, "\n{heading}:\n\n");
            for (said, keys) in keys {
                wrap(text, &format!("- {said}: {}", listed(keys)), "  ");
            }
        }
    }
}

fn listed(keys: &[String]) -> String {
    keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
}

/// A paragraph in lines of at most 120 columns; all but the first are indented.
fn wrap(text: &mut String, paragraph: &str, indent: &str) {
    let mut columns = 0;
    for word in paragraph.split_whitespace() {
        let own = word.chars().count();
        if columns > 0 && columns + 1 + own > 120 {
            let _ = write!(text, "\n{indent}");
            columns = indent.len();
        } else if columns > 0 {
            text.push(' ');
            columns += 1;
        }
        text.push_str(word);
        columns += own;
    }
    text.push('\n');
}
