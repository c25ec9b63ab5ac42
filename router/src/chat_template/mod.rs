//! Chat templates: from messages to the prompt the model was trained on.
//!
//! Templates are Jinja as Python's transformers runs it: `trim_blocks` and `lstrip_blocks` on, Python's string, list and
//! dict methods, `raise_exception` and `strftime_now`. Messages are flattened first: a template sees one string a
//! message, as with TGI.

mod functions;
mod limits;
mod messages;

use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use serde::Serialize;

use crate::types::ChatMessage;
use messages::TemplateMessage;

/// The name errors give to the template.
const TEMPLATE_NAME: &str = "<string>";

/// Why there is no prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The model has none.
    #[error("template not found")]
    NotFound,
    /// The template cannot be parsed, or refused the messages.
    #[error("{0}")]
    Render(String),
}

impl From<minijinja::Error> for TemplateError {
    fn from(error: minijinja::Error) -> Self {
        TemplateError::Render(limits::describe(&error))
    }
}

/// A compiled template with the texts it needs.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// It is not valid Jinja, or too long.
    pub fn new(
        source: &str,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TemplateError> {
        limits::check_source(source)?;
        let mut environment = Environment::new();
        limits::set(&mut environment);
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", functions::raise_exception);
        environment.add_function("strftime_now", functions::strftime_now);
        environment.add_filter("tojson", functions::tojson);
        let source = patch(source);
        limits::with_deep_stack(move || {
            environment.add_template_owned(TEMPLATE_NAME, source)?;
            Ok(Self { environment, bos_token, eos_token })
        })
    }

    /// Renders a conversation. When the last message is the assistant's, the prompt ends right after its content
    /// so that the model continues it.
    ///
    /// # Errors
    /// The template refused the messages, or takes too long for them.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, TemplateError> {
        let messages: Vec<TemplateMessage> = messages.iter().map(TemplateMessage::from).collect();
        let inputs = TemplateInputs {
            messages: &messages,
            bos_token: self.bos_token.as_deref(),
            eos_token: self.eos_token.as_deref(),
            add_generation_prompt: true,
        };
        let prompt = limits::with_deep_stack(|| {
            Ok(self.environment.get_template(TEMPLATE_NAME)?.render(Serde(&inputs))?)
        })?;
        Ok(match messages.last() {
            Some(last) if last.role == "assistant" => continue_after(prompt, &last.content),
            _ => prompt,
        })
    }
}

#[derive(Serialize)]
struct TemplateInputs<'a> {
    messages: &'a [TemplateMessage],
    #[serde(skip_serializing_if = "Option::is_none")]
    bos_token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eos_token: Option<&'a str>,
    add_generation_prompt: bool,
}

/// What minijinja does not know, or what assumes unflattened messages.
fn patch(source: &str) -> String {
    source
        .replace("[::-1]", "|reverse")
        .replace("{% generation %}", "")
        .replace("{% endgeneration %}", "")
        .replace("messages[0]['content'][0]['text']", "messages[0]['content']")
}

fn continue_after(mut prompt: String, content: &str) -> String {
    if let Some(start) = prompt.rfind(content) {
        prompt.truncate(start + content.len());
        prompt.truncate(prompt.trim_end().len());
    }
    prompt
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
        + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn render(source: &str, messages: &str) -> Result<String, String> {
        let messages: Vec<ChatMessage> = serde_json::from_str(messages).unwrap();
        let token = |text: &str| Some(text.to_string());
        let template =
            ChatTemplate::new(source, token("<s>"), token("</s>")).map_err(|error| error.to_string())?;
        template.render(&messages).map_err(|error| error.to_string())
    }

    const HELLO: &str = r#"[{"role":"user","content":"Hello"}]"#;

    #[test]
    fn chatml() {
        assert_eq!(
            render(CHATML, HELLO).unwrap(),
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_final_assistant_message_is_continued() {
        let messages = r#"[{"role":"user","content":"Count"},{"role":"assistant","content":"one, two "}]"#;
        assert_eq!(
            render(CHATML, messages).unwrap(),
            "<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\none, two"
        );
    }

    #[test]
    fn python_methods_and_tokens_are_there() {
        let source = "{{ bos_token }}{{ messages[0].content.strip().split(' ')[0].upper() }}\
            {{ messages[0].get('name', '-') }}{{ eos_token }}";
        assert_eq!(render(source, r#"[{"role":"user","content":" ab cd "}]"#).unwrap(), "<s>AB-</s>");
    }

    #[test]
    fn loop_controls_and_namespaces_work() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}\
            {% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{% if loop.index > 2 %}{% break %}{% endif %}\
            {% endfor %}{{ ns.n }}";
        let messages = r#"[{"role":"system","content":"s"},{"role":"user","content":"u"},
            {"role":"user","content":"v"},{"role":"user","content":"w"}]"#;
        assert_eq!(render(source, messages).unwrap(), "2");
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let source =
            "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend";
        assert_eq!(render(source, HELLO).unwrap(), "Hello\nend");
    }

    #[test]
    fn raise_exception_has_tgis_text() {
        let source = "{{ bos_token }}\n{{ raise_exception('roles must alternate') }}";
        assert_eq!(render(source, HELLO).unwrap_err(), "syntax error: roles must alternate (in <string>:2)");
        assert!(render("{% if %}", HELLO).unwrap_err().contains("in <string>:1"));
    }

    #[test]
    fn patches_make_upstream_templates_work() {
        let source = "{% for m in messages[::-1] %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}\
            {{ messages[0]['content'][0]['text'] }}";
        let messages = r#"[{"role":"user","content":"a"},{"role":"user","content":"b"}]"#;
        assert_eq!(render(source, messages).unwrap(), "baa");
    }

    #[test]
    fn parts_images_and_tool_calls_become_one_string() {
        let messages = r#"[{"role":"user","content":[{"type":"text","text":"What is "},
            {"type":"image_url","image_url":{"url":"http://x/y.png"}},{"type":"text","text":"?"}]},
            {"role":"assistant","tool_calls":[{"id":"0"}]},{"role":"tool","content":"42"}]"#;
        assert_eq!(
            render("{% for m in messages %}[{{ m.content }}]{% endfor %}", messages).unwrap(),
            r#"[What is ![](http://x/y.png)?][[{"id":"0"}]][42]"#
        );
    }

    /// What stands in for templates that are published, with a system message and without.
    #[test]
    fn published_templates_stay_within_the_limits() {
        let turn = |role: &str, text: &str| format!(r#"{{"role":"{role}","content":"{text}"}}"#);
        let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/chat_template");
        for (name, end) in [
            ("chatml", "<|im_start|>assistant\n"),
            ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
            ("qwen", "<|im_start|>assistant\n"),
            ("gemma", "<start_of_turn>model\n"),
            ("mistral", "[/INST]"),
            ("deepseek", "<think>\n"),
        ] {
            let source = std::fs::read_to_string(seeds.join(format!("{name}.jinja"))).unwrap();
            // 1,001 messages of 2,000 characters: as long as a request may be.
            let long = "word ".repeat(400);
            let mut messages = vec![turn("system", "Be brief.")];
            messages.extend((0..500).flat_map(|_| [turn("user", &long), turn("assistant", &long)]));
            messages.push(turn("user", "Why?"));
            for messages in [&messages[messages.len() - 1..], &messages[..]] {
                let prompt = render(&source, &format!("[{}]", messages.join(","))).unwrap();
                assert!(
                    prompt.trim_end_matches('\n').ends_with(end.trim_end_matches('\n')),
                    "{name}: {prompt:.200}"
                );
                assert!(prompt.contains("Why?"), "{name}");
            }
        }
    }

    #[test]
    fn hostile_templates_end_in_one_line() {
        let started = std::time::Instant::now();
        for (source, expected) in [
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion"),
            ("{% include '<string>' %}", "could not render include"),
            ("{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}", "does not end"),
            (
                "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
                "does not end",
            ),
            ("{{ 'x' * 999999999 }}", "does not end"),
            (
                "{% set n = namespace(x=[]) %}{% for a in range(9999) %}{% for b in range(99) %}{% set n.x = [n.x] %}\
                {% endfor %}{% endfor %}",
                "does not end",
            ),
            (
                "{{ [1] | tojson(indent=999999999999) }}",
                "indent of tojson is 999999999999, expected at most 16",
            ),
            ("{{ raise_exception('a\nb' * 9999) }}", "a ba b"),
        ] {
            let error = render(source, HELLO).unwrap_err();
            assert!(error.contains(expected), "{source}: {error}");
            assert!(!error.contains('\n') && error.len() < 1100, "{source}: {error}");
        }
        // As deep as they can be.
        for (start, level, end) in
            [("{{ a", ".b", " }}"), ("{{ a", "|e", " }}"), ("{% if a %}", "{% elif b %}", "{% endif %}")]
        {
            let levels = ((128 << 10) - start.len() - end.len()) / level.len();
            let source = format!("{start}{}{end}", level.repeat(levels));
            match render(&source, HELLO) {
                Ok(text) => assert!(text.is_empty(), "{level}"),
                Err(error) => assert!(error.len() < 1100, "{level}"),
            }
        }
        let error = render(&" ".repeat(2 << 20), HELLO).unwrap_err();
        assert_eq!(error, "the chat template has 2097152 bytes, expected at most 131072");
        assert!(started.elapsed() < std::time::Duration::from_secs(60));
    }

    #[test]
    fn strftime_now_and_tojson_follow_python() {
        let year = render("{{ strftime_now('%Y') }}", HELLO).unwrap();
        assert!(year.parse::<u32>().unwrap() >= 2025);
        assert!(render("{{ strftime_now('%!') }}", HELLO).is_err());
        assert_eq!(
            render("{{ messages | tojson }}", r#"[{"role":"user","content":"a<ü>'"}]"#).unwrap(),
            r#"[{"role": "user", "content": "a<ü>'"}]"#
        );
        assert_eq!(render("{{ [1] | tojson(indent=2) }}", HELLO).unwrap(), "[\n  1\n]");
    }
}
