//! A run watched and steered from another program: starts `lora train --events`, shows how the loss goes, and tells it to
//! save half-way and to stop soon after. `cargo run --release --example steer -- target/release/lora config.toml`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(lora), Some(config)) = (arguments.next(), arguments.next()) else {
        return Err("expected the path of the command `lora` and that of a configuration".into());
    };
    let mut run = Command::new(lora)
        .args(["train", "--events"])
        .arg(config)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let (Some(mut commands), Some(events)) = (run.stdin.take(), run.stdout.take()) else {
        return Err("the run has no pipes".into());
    };

    let mut lines = BufReader::new(events).lines();
    let first: Value = serde_json::from_str(&lines.next().ok_or("the run said nothing")??)?;
    if first["version"] != 1 {
        return Err(format!("this program reads version 1 of the events, not {}", first["version"]).into());
    }
    for line in lines {
        let event: Value = serde_json::from_str(&line?)?;
        match event["event"].as_str() {
            Some("preparing") => println!("{} {}/{}", event["stage"], event["done"], event["of"]),
            Some("step") => {
                let (step, steps) = (event["step"].as_u64(), event["steps"].as_u64());
                println!("{}/{}: loss {}", event["step"], event["steps"], event["loss"]);
                match step.zip(steps) {
                    // A run that is over already has no use for it.
                    Some((step, steps)) if step == steps / 2 => drop(writeln!(commands, "save")),
                    Some((step, steps)) if step == steps / 2 + 5 => drop(writeln!(commands, "stop")),
                    _ => {}
                }
            }
            Some("command") => println!("{}: {}", event["command"], event["message"]),
            Some("saved") => println!("{} with SHA-256 {}", event["path"], event["sha256"]),
            Some("finding") => println!("{}", event["message"]),
            Some("finished") => println!("done after {} steps: {}", event["step"], event["path"]),
            Some("failed") => println!("failed: {}", event["message"]),
            // Later versions of the command may tell more.
            _ => {}
        }
    }
    let status = run.wait()?;
    println!("{status}");
    Ok(())
}
