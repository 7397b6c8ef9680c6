//! Captions from a server over real HTTP: the protocol, what is tried again, what never replaces a caption, interruption.

mod mock;

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use image::{Rgb, RgbImage, Rgba, RgbaImage};
use lora_caption::{Captioner, Error, Existing, FolderOptions, Output, Report, Settings, caption_folder};
use mock::{Response, Server, caption, finished, plain};
use serde_json::json;

fn settings(server: &str) -> Settings {
    Settings {
        server: Some(server.to_owned()),
        model: Some("a-model".into()),
        prompt: Some("Describe {name}.".into()),
        ..Settings::default()
    }
}

fn pictures(count: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for index in 0..count {
        let picture = RgbImage::from_pixel(2, 3, Rgb([index as u8, (index / 256) as u8, 90]));
        picture.save(folder.path().join(format!("{index:04}.png"))).unwrap();
    }
    folder
}

fn run_until(
    settings: Settings,
    options: &FolderOptions,
    stop: &Arc<AtomicBool>,
    progress: &mut dyn FnMut(usize),
) -> lora_caption::Result<Report> {
    let captioner = Captioner::open(settings)?.with_pause(Duration::from_millis(5));
    caption_folder(&Arc::new(captioner), options, stop, &mut |own| progress(own.done))
}

fn run(settings: Settings, folder: &Path, existing: Existing) -> lora_caption::Result<Report> {
    let options = FolderOptions { folder: folder.to_owned(), existing, ..FolderOptions::default() };
    run_until(settings, &options, &Arc::default(), &mut |_| {})
}

/// Captions by picture, of those that have one.
fn captions(folder: &Path) -> Vec<(String, String)> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let texts = paths.filter(|path| path.extension().is_some_and(|own| own == "txt"));
    let mut all: Vec<_> = texts
        .map(|path| (path.file_stem().unwrap().to_string_lossy().into_owned(), fs::read_to_string(path).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn a_picture_is_sent_as_a_small_jpeg_with_the_prompt() {
    let server = Server::start(|_| caption("A red\nwall."));
    let folder = tempfile::tempdir().unwrap();
    RgbaImage::from_pixel(400, 100, Rgba([200, 0, 0, 128])).save(folder.path().join("a wall.png")).unwrap();
    let mut settings = settings(&(server.url() + "/v1"));
    settings.prompt = Some("{name} in {folder}: {\"json\": {tag}}".into());
    (settings.max_side, settings.temperature, settings.prefix) = (128, Some(0.5), "sks".into());
    let report = run(settings, folder.path(), Existing::Skip).unwrap();
    assert_eq!((report.pictures, report.captioned.len(), report.failed.len()), (1, 1, 0));
    assert_eq!(fs::read_to_string(folder.path().join("a wall.txt")).unwrap(), "sks, A red wall.\n");

    let requests = server.requests.lock().unwrap();
    let request = &requests[0];
    assert_eq!(request.line, "POST /v1/chat/completions HTTP/1.1");
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(request.header("authorization"), None);
    let name = folder.path().file_name().unwrap().to_string_lossy();
    assert_eq!(request.prompt(), format!("a wall in {name}: {{\"json\": {{tag}}}}"));
    let body = &request.body;
    assert_eq!(
        (&body["model"], &body["stream"], &body["temperature"]),
        (&json!("a-model"), &json!(false), &json!(0.5))
    );
    assert_eq!(body["max_tokens"], 512);
    let jpeg = request.picture().strip_prefix("data:image/jpeg;base64,").unwrap();
    let jpeg = base64::engine::general_purpose::STANDARD.decode(jpeg).unwrap();
    let picture = image::load_from_memory_with_format(&jpeg, image::ImageFormat::Jpeg).unwrap().into_rgb8();
    assert_eq!(picture.dimensions(), (128, 32));
    // Half of red over white.
    let Rgb([red, green, _]) = *picture.get_pixel(60, 16);
    assert!(red.abs_diff(227) < 4 && green.abs_diff(127) < 4, "{red} {green}");
}

#[test]
fn a_busy_server_is_asked_again_as_late_as_it_says() {
    let start = Instant::now();
    let times = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&times);
    let server = Server::start(move |request| {
        seen.lock().unwrap().push(start.elapsed());
        match request.number {
            0 => Response { headers: vec![("retry-after", "0.3".into())], ..plain(429, "slow down") },
            1 => plain(503, "<html>loading</html>"),
            2 => plain(500, "{\"error\":{\"message\":\"crashed\"}}"),
            _ => caption("At last."),
        }
    });
    let folder = pictures(1);
    let report = run(settings(&server.url()), folder.path(), Existing::Skip).unwrap();
    assert_eq!((report.captioned.len(), server.count()), (1, 4));
    let times = times.lock().unwrap();
    assert!(times[1] - times[0] >= Duration::from_millis(300), "{times:?}");
}

#[test]
fn a_server_that_stays_busy_costs_that_picture_and_no_caption() {
    let server = Server::start(|request| match request.prompt() {
        "Describe 0001." => plain(500, "{\"error\":{\"message\":\"out of memory\"}}"),
        _ => caption("Fine."),
    });
    let folder = pictures(3);
    fs::write(folder.path().join("0001.txt"), "by hand").unwrap();
    let mut settings = settings(&server.url());
    settings.retries = 2;
    let report = run(settings, folder.path(), Existing::Overwrite).unwrap();
    assert_eq!((report.captioned.len(), report.failed.len(), server.count()), (2, 1, 5));
    let failure = &report.failed[0];
    assert!(failure.path.ends_with("0001.png"));
    assert_eq!(failure.problem.to_string(), "the server answers 500 Internal Server Error: out of memory (3 tries)");
    assert_eq!(fs::read_to_string(folder.path().join("0001.txt")).unwrap(), "by hand");
}

#[test]
fn what_is_no_caption_never_replaces_one_and_is_counted() {
    let server = Server::start(|request| match request.prompt() {
        "Describe 0000." => caption("I'm sorry, but I can't assist with that request."),
        "Describe 0001." => caption(" \n"),
        "Describe 0002." => finished(json!({ "content": "A wall in" }), "length"),
        "Describe 0003." => caption("<think>It may be a wall."),
        "Describe 0004." => finished(json!({ "content": "", "reasoning_content": "A wall?" }), "length"),
        "Describe 0005." => finished(json!({ "content": null, "refusal": "No." }), "stop"),
        "Describe 0006." => plain(400, "{\"error\":{\"message\":\"image too small\"}}"),
        _ => caption("<think>hm</think>A wall."),
    });
    for existing in [Existing::Overwrite, Existing::Append, Existing::Prepend] {
        let folder = pictures(8);
        for index in 0..8 {
            fs::write(folder.path().join(format!("{index:04}.txt")), "by hand\nsecond line\n").unwrap();
        }
        let report = run(settings(&server.url()), folder.path(), existing).unwrap();
        let counts: Vec<_> = report.counts().into_iter().collect();
        let expected =
            [("cut off", 1), ("empty answers", 1), ("failed", 1), ("refused", 2), ("thoughts without an answer", 2)];
        assert_eq!(counts, expected);
        let captions = captions(folder.path());
        assert!(captions[..7].iter().all(|(_, text)| text == "by hand\nsecond line\n"), "{captions:?}");
        let new = match existing {
            Existing::Append => "by hand, A wall.\nsecond line\n",
            Existing::Prepend => "A wall., by hand\nsecond line\n",
            _ => "A wall.\n",
        };
        assert_eq!(captions[7].1, new);
        assert!(report.failed[6].problem.to_string().contains("400 Bad Request: image too small"));
    }
    // Captions that are there are left alone, and nothing is asked.
    let (folder, before) = (pictures(1), server.count());
    fs::write(folder.path().join("0000.txt"), "by hand").unwrap();
    let report = run(settings(&server.url()), folder.path(), Existing::Skip).unwrap();
    assert_eq!((report.kept, report.captioned.len(), server.count()), (1, 0, before));
}

#[test]
fn a_thousand_pictures_interrupted_twice_are_each_asked_once() {
    for (existing, output) in
        [(Existing::Skip, Output::Files), (Existing::Append, Output::Files), (Existing::Overwrite, Output::Csv)]
    {
        let server = Server::start(|request| caption(&format!("Seen {}", request.prompt())));
        let folder = pictures(1000);
        let options = FolderOptions { folder: folder.path().to_owned(), existing, output, ..FolderOptions::default() };
        let mut done = 0;
        for limit in [137, 402, usize::MAX] {
            let stop = Arc::new(AtomicBool::new(false));
            let ends = Arc::clone(&stop);
            let mut settings = settings(&server.url());
            settings.requests = 8;
            let mut progress = |count| ends.store(count >= limit, Ordering::Relaxed);
            let report = run_until(settings, &options, &stop, &mut progress).unwrap();
            assert_eq!(report.stopped, limit < usize::MAX);
            assert_eq!(report.kept, done);
            done += report.captioned.len();
            if output == Output::Files {
                assert_eq!(captions(folder.path()).len(), done);
            }
        }
        assert_eq!(done, 1000);
        let prompts: HashSet<String> =
            server.requests.lock().unwrap().iter().map(|request| request.prompt().to_owned()).collect();
        assert_eq!((server.count(), prompts.len()), (1000, 1000));
        match output {
            Output::Files => {
                let captions = captions(folder.path());
                assert!(captions.iter().all(|(name, text)| *text == format!("Seen Describe {name}.\n")));
            }
            _ => {
                let list = fs::read_to_string(folder.path().join("metadata.csv")).unwrap();
                assert_eq!(list.lines().count(), 1001);
                assert!(list.starts_with("filename,prompt\n0000.png,Seen Describe 0000.\n"));
            }
        }
        let left = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(left.into_iter().all(|name| !name.to_string_lossy().starts_with('.')), "nothing else is left");
    }
}

#[test]
fn several_requests_are_under_way_at_once() {
    let (now, most) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
    let (counted, highest) = (Arc::clone(&now), Arc::clone(&most));
    let server = Server::start(move |_| {
        *counted.lock().unwrap() += 1;
        std::thread::sleep(Duration::from_millis(50));
        let current = *counted.lock().unwrap();
        let mut highest = highest.lock().unwrap();
        *highest = current.max(*highest);
        *counted.lock().unwrap() -= 1;
        caption("A wall.")
    });
    let folder = pictures(20);
    let mut settings = settings(&server.url());
    settings.requests = 5;
    run(settings, folder.path(), Existing::Skip).unwrap();
    let most = *most.lock().unwrap();
    assert!((3..=5).contains(&most), "{most} at once");
}

#[test]
fn a_server_that_cannot_be_used_is_told_in_one_line() {
    let folder = pictures(50);
    let refused = |address: &str| {
        let error = run(settings(address), folder.path(), Existing::Skip).unwrap_err();
        assert!(matches!(error, Error::Server { .. }), "{error}");
        let error = error.to_string();
        assert!(!error.contains('\n') && captions(folder.path()).is_empty(), "{error}");
        error
    };
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = refused(&format!("http://{free}"));
    assert!(error.contains(&free.to_string()) && error.contains("is the server running?"), "{error}");
    for (answer, said) in [
        (plain(200, "<!doctype html><title>A page</title>"), "web page"),
        (plain(404, "<html>404</html>"), "no such model or address (404 Not Found)"),
        (plain(404, "{\"error\":{\"message\":\"model 'a-model' not found\"}}"), "model 'a-model' not found"),
        (plain(200, "{\"response\":\"A wall.\"}"), "no `choices`"),
        (plain(401, "{\"error\":\"who are you?\"}"), "LORA_API_KEY"),
        (
            Response { headers: vec![("location", "https://elsewhere/v1".into())], ..plain(301, "") },
            "leads on to https://elsewhere/v1",
        ),
        (Response { headers: vec![("retry-after", "7200".into())], ..plain(429, "") }, "asks to wait 7200 s"),
    ] {
        let answer = Mutex::new(answer);
        let server = Server::start(move |_| {
            let answer = answer.lock().unwrap();
            Response { status: answer.status, headers: answer.headers.clone(), body: answer.body.clone() }
        });
        let error = refused(&server.url());
        assert!(error.contains(said) && error.contains(&server.url()), "{error}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"220 mail ready\r\n");
        }
    });
    let error = refused(&format!("http://{address}"));
    assert!(error.contains("HTTP") || error.contains("connection"), "{error}");
}

#[test]
fn twenty_failures_without_a_caption_end_a_run() {
    let server = Server::start(|_| caption("I cannot help with that."));
    let folder = pictures(100);
    let error = run(settings(&server.url()), folder.path(), Existing::Skip).unwrap_err();
    assert!(error.to_string().contains("none of the first 20 pictures"), "{error}");
    assert!(error.to_string().contains("refused: I cannot help"), "{error}");
    assert!(server.count() < 60, "{}", server.count());
}

#[test]
fn what_was_written_stays_when_the_server_goes_away() {
    let server = Arc::new(Mutex::new(Server::start(|_| caption("A wall."))));
    let folder = pictures(200);
    let options = FolderOptions { folder: folder.path().to_owned(), ..FolderOptions::default() };
    let mut settings = settings(&server.lock().unwrap().url());
    (settings.requests, settings.retries) = (2, 2);
    let ends = Arc::clone(&server);
    let mut progress = |done| {
        if done == 50 {
            ends.lock().unwrap().end();
        }
    };
    let error = run_until(settings, &options, &Arc::default(), &mut progress).unwrap_err();
    assert!(matches!(error, Error::Server { .. }), "{error}");
    let written = captions(folder.path());
    assert!(written.len() >= 50 && written.iter().all(|(_, text)| text == "A wall.\n"), "{}", written.len());
}
