CREATE TABLE public.audit (
    sequence bigint NOT NULL,
    time_ns bigint NOT NULL,
    body bytea NOT NULL,
    digest bytea NOT NULL
);
CREATE TABLE public.changes (
    revision bigint NOT NULL,
    kind character varying(24) NOT NULL,
    subject bigint NOT NULL,
    template_id character varying(32) NOT NULL COLLATE pg_catalog."C"
);
CREATE TABLE public.chips (
    template_id character varying(32) NOT NULL COLLATE pg_catalog."C",
    encoding character varying(16) NOT NULL,
    chip bytea NOT NULL
);
CREATE TABLE public.confirmations (
    sequence bigint NOT NULL,
    by character varying(128) NOT NULL COLLATE pg_catalog."C",
    agrees boolean NOT NULL,
    time_ns bigint NOT NULL
);
CREATE TABLE public.counters (
    name character varying(64) NOT NULL COLLATE pg_catalog."C",
    value bigint NOT NULL
);
CREATE TABLE public.events (
    sequence bigint NOT NULL,
    kind character varying(32) NOT NULL,
    time_ns bigint NOT NULL,
    source_id character varying(256) NOT NULL,
    stream_id character varying(256) NOT NULL,
    gallery_id character varying(128) NOT NULL,
    body bytea NOT NULL
);
CREATE TABLE public.galleries (
    gallery_id character varying(128) NOT NULL COLLATE pg_catalog."C",
    settings json NOT NULL,
    created_ns bigint NOT NULL
);
CREATE TABLE public.keys (
    key_id character varying(64) NOT NULL COLLATE pg_catalog."C",
    kind character varying(16) NOT NULL,
    subject bigint,
    wrapped bytea NOT NULL,
    wrapped_by character varying(64) NOT NULL COLLATE pg_catalog."C",
    created_ns bigint NOT NULL
);
CREATE TABLE public.last_seen (
    subject bigint NOT NULL,
    seen_ns bigint NOT NULL
);
CREATE TABLE public.meta (
    name character varying(64) NOT NULL COLLATE pg_catalog."C",
    value character varying(1024) NOT NULL
);
CREATE TABLE public.requests (
    gallery_id character varying(128) NOT NULL COLLATE pg_catalog."C",
    request_id character varying(128) NOT NULL COLLATE pg_catalog."C",
    fingerprint bytea NOT NULL,
    template_id character varying(32) NOT NULL COLLATE pg_catalog."C",
    answer json,
    created_ns bigint NOT NULL
);
CREATE TABLE public.schema_version (
    version integer
);
CREATE TABLE public.shards (
    shard_id character varying(64) NOT NULL COLLATE pg_catalog."C",
    host character varying(128) NOT NULL,
    process character varying(64) NOT NULL,
    revision bigint NOT NULL,
    lease_until_ns bigint NOT NULL
);
CREATE TABLE public.subjects (
    id bigint NOT NULL,
    gallery_id character varying(128) NOT NULL COLLATE pg_catalog."C",
    subject_id character varying(128) NOT NULL COLLATE pg_catalog."C",
    display_name character varying(256) NOT NULL,
    labels json NOT NULL,
    etag character varying(32) NOT NULL,
    created_ns bigint NOT NULL,
    updated_ns bigint NOT NULL,
    sealed bytea
);
CREATE TABLE public.templates (
    id bigint NOT NULL,
    template_id character varying(32) NOT NULL COLLATE pg_catalog."C",
    subject bigint NOT NULL,
    model_id character varying(256) NOT NULL COLLATE pg_catalog."C",
    dim integer NOT NULL,
    vector bytea NOT NULL,
    ood_score double precision NOT NULL,
    created_ns bigint NOT NULL,
    quality double precision DEFAULT '0'::double precision NOT NULL
);
CREATE SEQUENCE public.templates_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.templates_id_seq OWNED BY public.templates.id;
ALTER TABLE ONLY public.templates ALTER COLUMN id SET DEFAULT nextval('public.templates_id_seq'::regclass);
INSERT INTO public.audit VALUES (1, 1795818164317338818, '\x7b22616374696f6e223a22454e524f4c4c4544222c2267616c6c657279223a2264656661756c74222c227375626a656374223a223930363964383764613366353330636265386539663237376165313863323631227d', '\x345b9c6d33504a9969f8d860f3badcc1a02fa9aa8fefcbffcfbccc3f513e9a32');
INSERT INTO public.audit VALUES (2, 1795818164329632662, '\x7b22616374696f6e223a225355424a4543545f55504441544544222c2267616c6c657279223a2264656661756c74222c227375626a656374223a223930363964383764613366353330636265386539663237376165313863323631227d', '\xe2e12c72529cc03cb98c3b5f8eaa72ef9856a3fc658338b5ba879a51505cd813');
INSERT INTO public.audit VALUES (3, 1795818164345539182, '\x7b22616374696f6e223a22454e524f4c4c4544222c2267616c6c657279223a227374616666222c227375626a656374223a223266333464313766646436323463613930656331663937653630646334333665227d', '\xebb1374bca2d570b2426867cb88bcea79ea5c419d11c338ec7baa58be3cfea26');
INSERT INTO public.audit VALUES (4, 1795818164352788637, '\x7b22616374696f6e223a225355424a4543545f55504441544544222c2267616c6c657279223a227374616666222c227375626a656374223a223266333464313766646436323463613930656331663937653630646334333665227d', '\xce5e3a23e6110e91b153b11b1091952ade6e4034731081b96504465fd4384fcf');
INSERT INTO public.audit VALUES (5, 1795818164367530227, '\x7b22616374696f6e223a22454e524f4c4c4544222c2267616c6c657279223a227374616666222c227375626a656374223a223662396465323064613261386633316336306330393061343830633438303964227d', '\xa25bc5c3d0363c612a47e4da36345da02ae8d800da129912f2ee2b8bbc4579fa');
INSERT INTO public.audit VALUES (6, 1795818164373844804, '\x7b22616374696f6e223a225355424a4543545f55504441544544222c2267616c6c657279223a227374616666222c227375626a656374223a223662396465323064613261386633316336306330393061343830633438303964227d', '\x364e4e262472c224e43c330b39ab9b0ebde660c2459e43ba928c1d757d178b71');
INSERT INTO public.audit VALUES (7, 1795818164398402647, '\x7b22616374696f6e223a225355424a4543545f44454c45544544222c2267616c6c657279223a227374616666222c227375626a656374223a223662396465323064613261386633316336306330393061343830633438303964227d', '\x5b0f613875b66b640a3f3e01bcdcb30863c1451952609a063c8a7dcb82ec58cb');
INSERT INTO public.changes VALUES (1, 'SUBJECT', 1, '');
INSERT INTO public.changes VALUES (2, 'TEMPLATE_ADDED', 1, '2c05d73e3376bcddc03c33986d7076dc');
INSERT INTO public.changes VALUES (3, 'SUBJECT', 1, '');
INSERT INTO public.changes VALUES (4, 'SUBJECT', 4, '');
INSERT INTO public.changes VALUES (5, 'TEMPLATE_ADDED', 4, 'd508887adb32ffbb3a632e018651d25c');
INSERT INTO public.changes VALUES (6, 'SUBJECT', 4, '');
INSERT INTO public.changes VALUES (7, 'SUBJECT', 7, '');
INSERT INTO public.changes VALUES (8, 'TEMPLATE_ADDED', 7, '5edd1cc4292492267ecf823ee3a8a1a2');
INSERT INTO public.changes VALUES (9, 'SUBJECT', 7, '');
INSERT INTO public.changes VALUES (10, 'SUBJECT_REMOVED', 7, '');
INSERT INTO public.chips VALUES ('2c05d73e3376bcddc03c33986d7076dc', 'bgr24', '\x532dc63b4d13c7ad4bac82f834773afe08cae7d9a29f772b5228d5a3d64eda6df1a3b0d009559537674866f2820483894377d3f16dbc70');
INSERT INTO public.chips VALUES ('d508887adb32ffbb3a632e018651d25c', 'bgr24', '\xddea7d649d76ba4aa844ad71307e112f86ea632ed7a1eb8dd173cb4cf2438c1cc60d084bf653c7b9f356ff82dd2ac2d2257e27ed0493fa');
INSERT INTO public.confirmations VALUES (2, 'guard', true, 1800000000000000000);
INSERT INTO public.counters VALUES ('events', 3);
INSERT INTO public.counters VALUES ('gallery', 10);
INSERT INTO public.counters VALUES ('audit', 7);
INSERT INTO public.events VALUES (1, 'STREAM_OPENED', 1800000000000000000, 'door', 's', '', '\x85a5747261636bc0a4706f6f6ca0a76d657373616765a0a673656e646572a0a472756c65c0');
INSERT INTO public.events VALUES (2, 'SUBJECT_SEEN', 1800000000000000000, 'door', 's', 'default', '\x85a5747261636b8ba8747261636b5f696407a866697273745f6e7300a76c6173745f6e7301b066697273745f636170747572655f6e73c0af6c6173745f636170747572655f6e73c0a3626f7884a17800a17900a5776964746801a668656967687401a86964656e7469747986a86465636973696f6ea54d41544348aa7375626a6563745f6964a131aa73696d696c6172697479cb3fe999999999999aaa63616e646964617465739182aa7375626a6563745f6964a131aa73696d696c6172697479cb3fe999999999999aa97468726573686f6c64c0a76365727461696ec3a86c6976656e65737383a776657264696374a44c495645a573636f7265cb3feccccccccccccdaa6e6f5f636f6e74657874c2a96f6f645f73636f7265c0ae626573745f6f6f645f73636f7265c0a56c6f6f6b7300a4706f6f6ca0a76d657373616765a0a673656e646572a0a472756c65c0');
INSERT INTO public.events VALUES (3, 'SUBJECT_SEEN', 1800000000000000001, 'door', 's', 'staff', '\x85a5747261636b8ba8747261636b5f696407a866697273745f6e7300a76c6173745f6e7301b066697273745f636170747572655f6e73c0af6c6173745f636170747572655f6e73c0a3626f7884a17800a17900a5776964746801a668656967687401a86964656e7469747986a86465636973696f6ea54d41544348aa7375626a6563745f6964a137aa73696d696c6172697479cb3fe999999999999aaa63616e646964617465739182aa7375626a6563745f6964a137aa73696d696c6172697479cb3fe999999999999aa97468726573686f6c64c0a76365727461696ec3a86c6976656e65737383a776657264696374a44c495645a573636f7265cb3feccccccccccccdaa6e6f5f636f6e74657874c2a96f6f645f73636f7265c0ae626573745f6f6f645f73636f7265c0a56c6f6f6b7300a4706f6f6ca0a76d657373616765a0a673656e646572a0a472756c65c0');
INSERT INTO public.galleries VALUES ('default', '{}', 1795818164287772022);
INSERT INTO public.galleries VALUES ('staff', '{}', 1795818164334452371);
INSERT INTO public.keys VALUES ('index', 'index', NULL, '\x2af8d8e78116cda7987b23f2fdf61de8d3d7cf286262d62aa966b7ecf678e56a2e9dcf7daf13c0f10c0ad9354389fca54c3bf4ff073857300090a7a6', '51f4634fe21c261e', 1795818164044032245);
INSERT INTO public.keys VALUES ('signing', 'signing', NULL, '\x965038e1abd2eb2a6050f1e3092f3e15688304a57873e3774b61986e1325e957f2dca2f7abe58630b0c34db97e34749478ab3b5b731fa826d988f475', '51f4634fe21c261e', 1795818164314558184);
INSERT INTO public.keys VALUES ('epoch-01795818164403558655-b61a212c', 'epoch', NULL, '\x684dc947591db94d4b8ad0b26cf9afcbd0aa67cf406ed0fa0839cd44e2916e6bb418d84f1ae43ef8458ae8c0307ef113ce82ff81818bee3f2bb37e85', '51f4634fe21c261e', 1795818164403619121);
INSERT INTO public.keys VALUES ('subject-1', 'subject', 1, '\xf39244385e134919bf63fc835959eddc69289d9738c7b4e36eb17deb66d6ca1501c041a300ee3b402462a0ebe22ab7425176b95bbaaa94a22ca408c5', 'epoch-01795818164403558655-b61a212c', 1795818164293108472);
INSERT INTO public.keys VALUES ('subject-4', 'subject', 4, '\x120541b4d580128f11b7f80b39c1618283e816996c422bd8916c0a758366d0442227c3367825b90bcf7cb66d6383ad3c257f9c41f3afdb5dd7ad2649', 'epoch-01795818164403558655-b61a212c', 1795818164336533286);
INSERT INTO public.last_seen VALUES (1, 1800000000000000000);
INSERT INTO public.meta VALUES ('store_id', '466444f149ccd64f');
INSERT INTO public.meta VALUES ('encryption', '1');
INSERT INTO public.meta VALUES ('audit_head', '{"log":"466444f149ccd64f","number":7,"time_ns":1795818164398402647,"digest":"5b0f613875b66b640a3f3e01bcdcb30863c1451952609a063c8a7dcb82ec58cb","key":"8epORhCYaEJRzOexS5H7eUUpUlE7xOT0EBk9um+A0/U=","signature":"otgjSV3ELJYCwx3vLo/1c8H9ZDC4KkjrcKC3kOvsn/nMV95jWvYo9SxWjIMcfFinskqiSNlD8XQg3VMwsyKADg==","stub":false}');
INSERT INTO public.requests VALUES ('default', '091c023d0a5022a5c70f1dfa8981013461330014beb6c628097752201a20e062', '\x6666666666666666666666666666666666666666666666666666666666666666', '2c05d73e3376bcddc03c33986d7076dc', '{"sealed": "12dcadae2f92ddab0986537718525982aba2eeed8ecd1d01eebb70410bef1008ecbf9a8a5f75c4ec5334"}', 1795818164305481703);
INSERT INTO public.requests VALUES ('staff', 'd59fe71008c66935c0d250107eb5a5876a0ba9e71b5d9a7e6ab972534fcf0e46', '\x6666666666666666666666666666666666666666666666666666666666666666', 'd508887adb32ffbb3a632e018651d25c', '{"sealed": "caf58c0bc17822b4834c3f54acf5f9326e0efa400384bc28b28ed679b9359304b8664b986d0a745d48"}', 1795818164342270582);
INSERT INTO public.requests VALUES ('staff', '7d64ea1255275dae2f1e458977db24e0b62d5f1c5854c99528fd5f5f231ad57c', '\x6666666666666666666666666666666666666666666666666666666666666666', '5edd1cc4292492267ecf823ee3a8a1a2', NULL, 1795818164364516332);
INSERT INTO public.schema_version VALUES (5);
INSERT INTO public.subjects VALUES (1, 'default', 'f5a1d3441c89876cd239a1b93ac4821af77e0fafb7370eea3bdd5f5c43c42dd6', '', '{}', '622048b66d1173f2', 1795818164287772022, 1795818164324394405, '\x70a1f203e38616cf9920839233ff40cedc0eda970e20ba72f19955a50dc0ef89fb8d2b6b91735d062de429001444036b04ee5b');
INSERT INTO public.subjects VALUES (4, 'staff', '17ae5ef091ea701c128b99eeaacf6f9eceebda216378b6df46c9d15427d2b4e3', '', '{}', '84f4273658c0bf82', 1795818164334452371, 1795818164349937703, '\x0a55738e473c5251c5ce352d679fd5d2b8b745f7a8c1ce1e2962b1174974301f15bfea119bac3bfd1e5033a53b10b5a9ff');
INSERT INTO public.templates VALUES (1, '2c05d73e3376bcddc03c33986d7076dc', 1, 'm@1#aa', 8, '\x49233ec606d766e26c158f748c054541e60d84f8e6a3f93b4dc312114f72f79b89374ac8553b583babb0808f', 0.9, 1795818164300600807, 0.5);
INSERT INTO public.templates VALUES (2, 'd508887adb32ffbb3a632e018651d25c', 4, 'm@1#aa', 8, '\x55d43afb423b73172bdf092d0a5a83a21c1d8f295412a1394a4fa7edb87b0135940bbb728a603f42d7cdcf2c', 0.9, 1795818164339838851, 0.5);
SELECT pg_catalog.setval('public.templates_id_seq', 3, true);
ALTER TABLE ONLY public.audit
    ADD CONSTRAINT audit_pkey PRIMARY KEY (sequence);
ALTER TABLE ONLY public.changes
    ADD CONSTRAINT changes_pkey PRIMARY KEY (revision);
ALTER TABLE ONLY public.chips
    ADD CONSTRAINT chips_pkey PRIMARY KEY (template_id);
ALTER TABLE ONLY public.confirmations
    ADD CONSTRAINT confirmations_pkey PRIMARY KEY (sequence, by);
ALTER TABLE ONLY public.counters
    ADD CONSTRAINT counters_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (sequence);
ALTER TABLE ONLY public.galleries
    ADD CONSTRAINT galleries_pkey PRIMARY KEY (gallery_id);
ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_pkey PRIMARY KEY (key_id);
ALTER TABLE ONLY public.last_seen
    ADD CONSTRAINT last_seen_pkey PRIMARY KEY (subject);
ALTER TABLE ONLY public.meta
    ADD CONSTRAINT meta_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.requests
    ADD CONSTRAINT requests_pkey PRIMARY KEY (gallery_id, request_id);
ALTER TABLE ONLY public.shards
    ADD CONSTRAINT shards_pkey PRIMARY KEY (shard_id);
ALTER TABLE ONLY public.subjects
    ADD CONSTRAINT subjects_gallery_id_subject_id_key UNIQUE (gallery_id, subject_id);
ALTER TABLE ONLY public.subjects
    ADD CONSTRAINT subjects_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.templates
    ADD CONSTRAINT templates_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.templates
    ADD CONSTRAINT templates_template_id_key UNIQUE (template_id);
CREATE INDEX ix_events_time_ns ON public.events USING btree (time_ns);
CREATE INDEX ix_keys_subject ON public.keys USING btree (subject);
CREATE INDEX ix_keys_wrapped_by ON public.keys USING btree (wrapped_by);
CREATE INDEX ix_requests_created_ns ON public.requests USING btree (created_ns);
CREATE INDEX ix_requests_template_id ON public.requests USING btree (template_id);
CREATE INDEX ix_templates_model_id ON public.templates USING btree (model_id);
CREATE INDEX ix_templates_subject ON public.templates USING btree (subject);
ALTER TABLE ONLY public.chips
    ADD CONSTRAINT chips_template_id_fkey FOREIGN KEY (template_id) REFERENCES public.templates(template_id) ON DELETE CASCADE;
ALTER TABLE ONLY public.confirmations
    ADD CONSTRAINT confirmations_sequence_fkey FOREIGN KEY (sequence) REFERENCES public.events(sequence) ON DELETE CASCADE;
ALTER TABLE ONLY public.last_seen
    ADD CONSTRAINT last_seen_subject_fkey FOREIGN KEY (subject) REFERENCES public.subjects(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.templates
    ADD CONSTRAINT templates_subject_fkey FOREIGN KEY (subject) REFERENCES public.subjects(id) ON DELETE CASCADE;
