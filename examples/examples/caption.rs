//! Captions for a folder of pictures by another program: a tagger, a server, or both, without libtorch.
//!
//! `cargo run --release --example caption FOLDER --tagger TAGGER`
//! `cargo run --release --example caption FOLDER --server http://localhost:11434 MODEL`

use std::error::Error;
use std::sync::Arc;

use lora_caption::{Captioner, FolderOptions, Settings, caption_folder};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (folder, settings) = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [folder, "--tagger", tagger] => (
            *folder,
            Settings { tagger: Some(tagger.into()), always_first: vec!["1girl".into()], ..Settings::default() },
        ),
        [folder, "--server", server, model] => {
            let (server, model) = (Some((*server).to_owned()), Some((*model).to_owned()));
            (*folder, Settings { server, model, prefix: "a picture by me".into(), ..Settings::default() })
        }
        _ => return Err("give a folder, and --tagger TAGGER or --server ADDRESS MODEL".into()),
    };
    let captioner = Arc::new(Captioner::open(settings)?);
    // A look first: nothing is written. Set from another thread, `stop` ends the run.
    let options = FolderOptions { folder: folder.into(), dry_run: true, ..FolderOptions::default() };
    let stop = Arc::default();
    let report = caption_folder(&captioner, &options, &stop, &mut |own| match own.caption {
        Ok(caption) => println!("{}/{} {}: {caption}", own.done, own.of, own.name),
        Err(problem) => println!("{}/{} {}: none, {problem}", own.done, own.of, own.name),
    })?;
    println!("{} of {} pictures would get a caption", report.captioned.len(), report.pictures);
    for (tag, count) in report.ranked_tags().into_iter().take(10) {
        println!("{count:>5} {tag}");
    }
    Ok(())
}
