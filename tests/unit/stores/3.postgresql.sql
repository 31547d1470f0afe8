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
CREATE TABLE public.counters (
    name character varying(64) NOT NULL COLLATE pg_catalog."C",
    value bigint NOT NULL
);
CREATE TABLE public.event_subjects (
    sequence bigint NOT NULL,
    subject bigint NOT NULL
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
    updated_ns bigint NOT NULL
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
INSERT INTO public.changes VALUES (1, 'SUBJECT', 1, '');
INSERT INTO public.changes VALUES (2, 'TEMPLATE_ADDED', 1, 'df0bb0772e7d12289c526ad6bc69d8e3');
INSERT INTO public.changes VALUES (3, 'SUBJECT', 1, '');
INSERT INTO public.changes VALUES (4, 'SUBJECT', 4, '');
INSERT INTO public.changes VALUES (5, 'TEMPLATE_ADDED', 4, 'd7aaeec2df3720973910ea3694965ce4');
INSERT INTO public.changes VALUES (6, 'SUBJECT', 4, '');
INSERT INTO public.changes VALUES (7, 'SUBJECT', 7, '');
INSERT INTO public.changes VALUES (8, 'TEMPLATE_ADDED', 7, '14b72f21500dab73e68cfb6fb156135b');
INSERT INTO public.changes VALUES (9, 'SUBJECT', 7, '');
INSERT INTO public.changes VALUES (10, 'SUBJECT_REMOVED', 7, '');
INSERT INTO public.counters VALUES ('audit', 0);
INSERT INTO public.counters VALUES ('events', 0);
INSERT INTO public.counters VALUES ('gallery', 10);
INSERT INTO public.galleries VALUES ('default', '{}', 1795818152459543895);
INSERT INTO public.galleries VALUES ('staff', '{}', 1795818152562360798);
INSERT INTO public.meta VALUES ('store_id', '4be812fc62983994');
INSERT INTO public.requests VALUES ('default', '1bdb8e3396e9653944b594194400437abf134040f8288c7d6c44b5edddc261b8', '\x6666666666666666666666666666666666666666666666666666666666666666', 'df0bb0772e7d12289c526ad6bc69d8e3', '{"said": "ada"}', 1795818152497468403);
INSERT INTO public.requests VALUES ('staff', '57f9e2a727bbbd205f04646ba2726cde4615418e2ac2ab2be7de95a1fae80344', '\x6666666666666666666666666666666666666666666666666666666666666666', 'd7aaeec2df3720973910ea3694965ce4', '{"said": "bo"}', 1795818152592718139);
INSERT INTO public.requests VALUES ('staff', '80dbf8627074d103c1dc0dceab08fb352ad445d9bde3deb247d34b8884cf2b25', '\x6666666666666666666666666666666666666666666666666666666666666666', '14b72f21500dab73e68cfb6fb156135b', NULL, 1795818152639381019);
INSERT INTO public.schema_version VALUES (3);
INSERT INTO public.subjects VALUES (1, 'default', 'ada', 'Ada', '{"k": "v"}', '0ef77e8c25a2c620', 1795818152459543895, 1795818152520606352);
INSERT INTO public.subjects VALUES (4, 'staff', 'bo', 'Bo', '{"k": "v"}', '039c35c9a3215b9e', 1795818152562360798, 1795818152606406094);
INSERT INTO public.templates VALUES (1, 'df0bb0772e7d12289c526ad6bc69d8e3', 1, 'm@1#aa', 8, '\x522c8aac8035352b9ab436329a391138', 0.9, 1795818152490220718, 0.5);
INSERT INTO public.templates VALUES (2, 'd7aaeec2df3720973910ea3694965ce4', 4, 'm@1#aa', 8, '\x5e31613622310fb90737ee322bb48334', 0.9, 1795818152588667356, 0.5);
SELECT pg_catalog.setval('public.templates_id_seq', 3, true);
ALTER TABLE ONLY public.audit
    ADD CONSTRAINT audit_pkey PRIMARY KEY (sequence);
ALTER TABLE ONLY public.changes
    ADD CONSTRAINT changes_pkey PRIMARY KEY (revision);
ALTER TABLE ONLY public.chips
    ADD CONSTRAINT chips_pkey PRIMARY KEY (template_id);
ALTER TABLE ONLY public.counters
    ADD CONSTRAINT counters_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.event_subjects
    ADD CONSTRAINT event_subjects_pkey PRIMARY KEY (sequence, subject);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (sequence);
ALTER TABLE ONLY public.galleries
    ADD CONSTRAINT galleries_pkey PRIMARY KEY (gallery_id);
ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_pkey PRIMARY KEY (key_id);
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
CREATE INDEX ix_event_subjects_subject ON public.event_subjects USING btree (subject);
CREATE INDEX ix_events_time_ns ON public.events USING btree (time_ns);
CREATE INDEX ix_keys_subject ON public.keys USING btree (subject);
CREATE INDEX ix_keys_wrapped_by ON public.keys USING btree (wrapped_by);
CREATE INDEX ix_requests_created_ns ON public.requests USING btree (created_ns);
CREATE INDEX ix_requests_template_id ON public.requests USING btree (template_id);
CREATE INDEX ix_templates_model_id ON public.templates USING btree (model_id);
CREATE INDEX ix_templates_subject ON public.templates USING btree (subject);
ALTER TABLE ONLY public.chips
    ADD CONSTRAINT chips_template_id_fkey FOREIGN KEY (template_id) REFERENCES public.templates(template_id) ON DELETE CASCADE;
ALTER TABLE ONLY public.event_subjects
    ADD CONSTRAINT event_subjects_sequence_fkey FOREIGN KEY (sequence) REFERENCES public.events(sequence) ON DELETE CASCADE;
ALTER TABLE ONLY public.event_subjects
    ADD CONSTRAINT event_subjects_subject_fkey FOREIGN KEY (subject) REFERENCES public.subjects(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.templates
    ADD CONSTRAINT templates_subject_fkey FOREIGN KEY (subject) REFERENCES public.subjects(id) ON DELETE CASCADE;
