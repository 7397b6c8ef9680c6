//! Captions from a server of OpenAI's protocol (`POST /v1/chat/completions`), as Ollama, LM Studio, llama.cpp and vLLM have it:
//! the request, and what is tried again. What an answer says is in [`answer`].

mod answer;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use ureq::http::{StatusCode, Uri};

use crate::settings::Settings;
use crate::{Error, Problem, Result};
use answer::Body;

/// Variable of the server's key where no other is named.
const KEY: &str = "LORA_API_KEY";
/// The most bytes of an answer: captions have thousands.
const MAX_ANSWER: u64 = 8 << 20;
/// The longest wait that a server may ask for.
const MAX_WAIT: Duration = Duration::from_secs(600);
/// The longest wait between tries of one's own accord.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Between looks at whether to stop.
const MOMENT: Duration = Duration::from_millis(20);

/// A server and one of its models. Threads may share it.
pub(crate) struct Server {
    agent: ureq::Agent,
    address: String,
    key: Option<Secret>,
    model: String,
    max_tokens: usize,
    temperature: Option<f64>,
    retries: usize,
    timeout: Duration,
    /// The wait before the first repetition; it doubles with each.
    pause: Duration,
    /// Until when the server asked all to wait.
    not_before: Mutex<Option<Instant>>,
    /// Whether it has answered anything yet: one that never did is not waited for.
    has_answered: AtomicBool,
}

/// A key that no message shows.
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("address", &self.address).field("model", &self.model).finish_non_exhaustive()
    }
}

/// What came of a request.
#[derive(Debug)]
pub(crate) enum Answer {
    /// A caption.
    Caption(String),
    /// None for this picture.
    Problem(Problem),
    /// None because the run is to stop.
    Stopped,
}

/// What came of one try.
enum Try {
    Answer(Answer),
    /// It may go better later: after how long, as far as the server says, and what it says otherwise.
    Again(Option<Duration>, Again),
    /// It goes better for no picture.
    Fatal(String),
}

enum Again {
    /// The server is there and cannot now.
    Busy(String),
    /// It is not there any more.
    Gone(String),
}

impl Server {
    /// Looks at address and key; the server is not asked yet.
    ///
    /// # Errors
    /// [`Error::Option`] where the address is none, or the named variable has no key.
    pub(crate) fn new(address: &str, settings: &Settings) -> Result<Self> {
        let (address, is_local) = endpoint(address)?;
        let named = settings.api_key_env.as_deref();
        let key = std::env::var(named.unwrap_or(KEY)).ok().map(|key| key.trim().to_owned());
        let key = key.filter(|key| !key.is_empty());
        if let (None, Some(named)) = (&key, named) {
            return Err(Error::option("api_key_env", format!("the environment variable {named} is not set")));
        }
        if key.as_ref().is_some_and(|key| !key.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(Error::option("api_key_env", "the key has characters that no header can carry"));
        }
        let mut agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections_per_host(settings.requests)
            .user_agent(concat!("lora/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_global(Some(settings.timeout()));
        if is_local {
            // A proxy does not lead to this machine.
            agent = agent.proxy(None);
        }
        Ok(Self {
            agent: agent.build().new_agent(),
            address,
            key: key.map(Secret),
            model: settings.model.clone().unwrap_or_default(),
            max_tokens: settings.max_tokens,
            temperature: settings.temperature,
            retries: settings.retries,
            timeout: settings.timeout(),
            pause: Duration::from_secs(1),
            not_before: Mutex::new(None),
            has_answered: AtomicBool::new(false),
        })
    }

    /// Shorter waits, for tests.
    pub(crate) fn pausing(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    /// Asks for a caption of a JPEG.
    ///
    /// # Errors
    /// [`Error::Server`] where no picture could get one.
    pub(crate) fn ask(&self, prompt: &str, jpeg: &[u8], ends: &dyn Fn() -> bool) -> Result<Answer> {
        let body = self.request(prompt, jpeg);
        let mut pause = self.pause;
        for repetition in 0.. {
            if !self.may_go(ends) {
                return Ok(Answer::Stopped);
            }
            let (after, again) = match self.once(&body) {
                Try::Answer(answer) => return Ok(answer),
                Try::Fatal(reason) => return Err(self.failed(&reason)),
                Try::Again(after, again) => (after, again),
            };
            let never_answered = !self.has_answered.load(Ordering::Relaxed);
            match again {
                Again::Gone(reason) if never_answered || repetition == self.retries => {
                    return Err(self.failed(&reason));
                }
                Again::Busy(reason) if repetition == self.retries => {
                    let tries = repetition + 1;
                    return Ok(Answer::Problem(Problem::Failed(self.scrubbed(&format!("{reason} ({tries} tries)")))));
                }
                _ => {}
            }
            match after {
                Some(wait) if wait > MAX_WAIT => {
                    let reason = format!("it asks to wait {} s; run again then", wait.as_secs());
                    return Err(self.failed(&reason));
                }
                Some(wait) => self.hold(wait),
                None => {
                    if !sleep_until(Instant::now() + pause, ends) {
                        return Ok(Answer::Stopped);
                    }
                }
            }
            pause = (2 * pause).min(MAX_PAUSE);
        }
        Ok(Answer::Stopped)
    }

    fn request(&self, prompt: &str, jpeg: &[u8]) -> String {
        let picture = format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg));
        let mut body = json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": [
                { "type": "text", "text": prompt },
                { "type": "image_url", "image_url": { "url": picture } },
            ] }],
            "max_tokens": self.max_tokens,
            "stream": false,
        });
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        body.to_string()
    }

    fn once(&self, body: &str) -> Try {
        let mut request = self.agent.post(&self.address).content_type("application/json");
        if let Some(Secret(key)) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = match request.send(body) {
            Ok(response) => response,
            Err(error) => return self.not_sent(error),
        };
        let status = response.status();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (after, location) = (header("retry-after"), header("location"));
        let text = match response.body_mut().with_config().limit(MAX_ANSWER).lossy_utf8(true).read_to_string() {
            Ok(text) => text,
            Err(ureq::Error::BodyExceedsLimit(_)) => {
                return Try::Fatal(format!("its answer has more than {MAX_ANSWER} bytes"));
            }
            Err(error) => return self.not_sent(error),
        };
        self.answered(status, &text, after.as_deref().and_then(wait_of), location)
    }

    fn answered(&self, status: StatusCode, text: &str, after: Option<Duration>, location: Option<String>) -> Try {
        let said = || {
            let own = serde_json::from_str(text).ok().and_then(|value: Value| answer::error_message(&value));
            let own = own.or_else(|| (!answer::looks_like_html(text)).then(|| answer::shortened(text)));
            own.filter(|own| !own.is_empty()).map_or_else(String::new, |own| format!(": {own}"))
        };
        let hint = "give the address of its OpenAI-compatible API, usually ending in /v1";
        match status.as_u16() {
            200..=299 => match answer::read(text) {
                Body::Foreign(reason) => Try::Fatal(format!("{reason}; {hint}")),
                Body::Problem(Problem::Failed(reason)) => {
                    self.has_answered.store(true, Ordering::Relaxed);
                    Try::Answer(Answer::Problem(Problem::Failed(self.scrubbed(&reason))))
                }
                Body::Problem(problem) => {
                    self.has_answered.store(true, Ordering::Relaxed);
                    Try::Answer(Answer::Problem(problem))
                }
                Body::Caption(caption) => {
                    self.has_answered.store(true, Ordering::Relaxed);
                    Try::Answer(Answer::Caption(caption))
                }
            },
            300..=399 => {
                let to = location.map_or_else(String::new, |to| format!(" to {}", answer::shortened(&to)));
                Try::Fatal(format!("it leads on{to} ({status}); give that address"))
            }
            401 | 403 => Try::Fatal(format!(
                "it refuses access ({status}){}; put its key into the environment variable {KEY}, or name another with api_key_env",
                said()
            )),
            404 | 405 => Try::Fatal(format!("it has no such model or address ({status}){}; {hint}", said())),
            408 | 425 | 429 | 500 | 502..=504 | 506..=599 => {
                self.has_answered.store(true, Ordering::Relaxed);
                Try::Again(after, Again::Busy(format!("the server answers {status}{}", said())))
            }
            _ if answer::looks_like_html(text) => Try::Fatal(format!("it answers with a web page ({status}); {hint}")),
            _ => Try::Answer(Answer::Problem(Problem::Failed(
                self.scrubbed(&format!("the server answers {status}{}", said())),
            ))),
        }
    }

    /// Where no answer came.
    fn not_sent(&self, error: ureq::Error) -> Try {
        match error {
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
                Try::Again(None, Again::Gone("it cannot be reached; is it running there?".into()))
            }
            ureq::Error::Timeout(_) => {
                Try::Again(None, Again::Busy(format!("no answer within {} s (timeout)", self.timeout.as_secs())))
            }
            ureq::Error::HostNotFound => Try::Fatal("there is no host of this name".into()),
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Try::Again(None, Again::Gone(format!("nothing listens there ({error}); is the server running?")))
            }
            ureq::Error::Io(error) => Try::Again(None, Again::Gone(format!("the connection broke ({error})"))),
            ureq::Error::ConnectionFailed => Try::Again(None, Again::Gone("it cannot be reached".into())),
            ureq::Error::Protocol(error) => Try::Fatal(format!("it does not speak HTTP ({error})")),
            error => Try::Fatal(error.to_string()),
        }
    }

    /// Has all requests wait.
    fn hold(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut not_before = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        *not_before = Some(not_before.map_or(until, |earlier| earlier.max(until)));
    }

    /// Waits as long as the server asked; `false` where the run is to stop.
    fn may_go(&self, ends: &dyn Fn() -> bool) -> bool {
        let until = *self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        sleep_until(until.unwrap_or_else(Instant::now), ends)
    }

    fn failed(&self, reason: &str) -> Error {
        Error::Server { address: self.address.clone(), reason: self.scrubbed(reason) }
    }

    /// What a server says, without the key, which some repeat.
    fn scrubbed(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |Secret(key)| text.replace(key.as_str(), "…"))
    }
}

/// Sleeps until then; `false` where the run is to stop.
fn sleep_until(until: Instant, ends: &dyn Fn() -> bool) -> bool {
    loop {
        if ends() {
            return false;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(MOMENT));
    }
}

/// What `Retry-After` says: seconds, or a date.
fn wait_of(header: &str) -> Option<Duration> {
    let header = header.trim();
    if let Ok(seconds) = header.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let date = jiff::fmt::rfc2822::parse(header).ok()?.timestamp();
    let left = date.duration_since(jiff::Timestamp::now());
    Some(Duration::try_from(left).unwrap_or_default())
}

/// Where requests go, of an address as people write it, and whether that is on this machine.
fn endpoint(address: &str) -> Result<(String, bool)> {
    let refused =
        |reason: &str| Error::option("server", format!("{reason}; expected an address such as http://localhost:11434"));
    let trimmed = address.trim().trim_end_matches('/');
    let with_scheme = if trimmed.contains("://") { trimmed.to_owned() } else { format!("http://{trimmed}") };
    // An address with a password is not repeated in a message.
    if with_scheme.contains('@') {
        return Err(refused(
            "it has a name or password in it; a key belongs into an environment variable (api_key_env)",
        ));
    }
    let uri: Uri = with_scheme.parse().map_err(|_| refused(&format!("`{trimmed}` is no address")))?;
    let host =
        uri.host().filter(|host| !host.is_empty()).ok_or_else(|| refused(&format!("`{trimmed}` names no host")))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(refused(&format!("`{trimmed}` is neither http nor https")));
    }
    if uri.query().is_some() {
        return Err(refused("it has a `?` in it"));
    }
    let is_local = host == "localhost" || host.starts_with("127.") || host == "[::1]";
    let last = uri.path().rsplit('/').next().unwrap_or_default();
    let is_version =
        last.strip_prefix('v').is_some_and(|number| number.starts_with(|digit: char| digit.is_ascii_digit()));
    let behind = match (uri.path().ends_with("/chat/completions"), is_version) {
        (true, _) => "",
        (false, true) => "/chat/completions",
        (false, false) => "/v1/chat/completions",
    };
    Ok((format!("{with_scheme}{behind}"), is_local))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_completed_as_people_write_it() {
        for (written, meant) in [
            ("http://localhost:11434", "http://localhost:11434/v1/chat/completions"),
            ("localhost:1234/", "http://localhost:1234/v1/chat/completions"),
            ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1/chat/completions"),
            ("https://openrouter.ai/api/v1/", "https://openrouter.ai/api/v1/chat/completions"),
            ("https://h/v1beta/openai/chat/completions", "https://h/v1beta/openai/chat/completions"),
            ("https://h/proxy", "https://h/proxy/v1/chat/completions"),
        ] {
            assert_eq!(endpoint(written).unwrap().0, meant);
        }
        for (written, local) in [("localhost:1", true), ("http://[::1]:2", true), ("http://10.0.0.1", false)] {
            assert_eq!(endpoint(written).unwrap().1, local, "{written}");
        }
        for (written, said) in [
            ("", "is no address"),
            ("ftp://h", "neither http nor https"),
            ("http://me:secret@h", "name or password"),
            ("http://h/v1?key=secret", "`?`"),
        ] {
            let error = endpoint(written).unwrap_err().to_string();
            assert!(error.contains(said) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_wait_is_seconds_or_a_date() {
        assert_eq!(wait_of("3"), Some(Duration::from_secs(3)));
        assert_eq!(wait_of(" 0.5 "), Some(Duration::from_millis(500)));
        assert_eq!(wait_of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert!(wait_of("Sat, 06 Nov 2094 08:49:37 GMT").unwrap() > Duration::from_secs(86_400));
        assert_eq!((wait_of("soon"), wait_of("-1")), (None, None));
    }
}
